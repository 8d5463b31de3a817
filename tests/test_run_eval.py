"""The door that scores a checkpoint: one confusion matrix, whatever the batches and processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run_eval
from evaluation_ita.benchmarks import BENCHMARKS, Benchmark
from evaluation_ita.door import DoorError, load_checkpoint
from tiny_checkpoint import CLASSES, save_tiny_checkpoint

ROOT = Path(__file__).parents[1]
SEEN = [True, True, False, False]
SIZES = [(48, 64), (64, 48), (70, 70), (48, 64), (40, 100)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def squares(limit: int | None = None) -> Benchmark:
    """Noise with labels of sizes of their own, as data sets have them."""
    rng = np.random.default_rng(0)
    rows = []
    for height, width in SIZES[:limit]:
        label = rng.integers(0, 4, (height, width)).astype(np.uint8)
        label[:3] = 255
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        rows.append({"image": picture, "label": Image.fromarray(label)})
    classes = [[entry] if isinstance(entry, str) else entry for entry in CLASSES]
    return Benchmark(classes=classes, seen=SEEN, pictures=rows)


@pytest.fixture
def scored(checkpoint, tmp_path, monkeypatch):
    """Runs the door on the squares; gives their scores."""
    monkeypatch.setitem(BENCHMARKS, "squares", squares)

    def run(*arguments) -> dict:
        output = tmp_path / "_".join(["out", *map(str, arguments)])
        given = ["--model", checkpoint, "--benchmarks", "squares", "--output", output, *arguments]
        assert run_eval.evaluate([str(argument) for argument in given]) == 0
        assert sorted(path.name for path in output.iterdir()) == ["results.json", "results.md"]
        return json.loads((output / "results.json").read_text())["benchmarks"]["squares"]

    return run


def test_scores_are_those_of_one_matrix_over_all_pictures(scored, checkpoint):
    import torch

    model, processor = load_checkpoint(checkpoint, "cpu")
    matrix = np.zeros((4, 4), int)
    for row in squares().pictures:
        with torch.inference_mode():
            outputs = model(**processor(images=row["image"], return_tensors="pt"))
        reference = np.array(row["label"])
        prediction = processor.post_process_semantic_segmentation(outputs, target_sizes=[reference.shape])[0]
        for one, other in zip(reference.ravel(), prediction.numpy().ravel(), strict=True):
            if one != 255:
                matrix[one, other] += 1
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    iou = np.diag(matrix) / union
    scores = scored("--batch_size", 1)
    assert scores["num_images"] == len(SIZES)
    assert scores["miou"] == pytest.approx(iou.mean())
    assert scores["miou_seen"] == pytest.approx(iou[:2].mean())
    assert scores["miou_unseen"] == pytest.approx(iou[2:].mean())
    assert [entry["iou"] for entry in scores["classes"]] == pytest.approx(iou.tolist())


def test_pictures_of_different_sizes_in_one_batch_score_as_one_at_a_time(scored):
    one, many = scored("--batch_size", 1), scored("--batch_size", 3)
    for name in ("miou", "miou_seen", "miou_unseen", "pacc"):
        assert one[name] == pytest.approx(many[name], abs=2e-3)


def test_limit_and_size_are_heeded(scored):
    assert scored("--limit", 2)["num_images"] == 2
    assert scored("--limit", 2, "--size", 32)["num_images"] == 2


def test_labels_that_are_no_classes_stop_it_with_one_line(scored, monkeypatch):
    rows = [{"image": Image.new("RGB", (8, 8)), "label": np.full((8, 8), 9, np.uint8)}]
    monkeypatch.setitem(BENCHMARKS, "squares", lambda limit: Benchmark(squares().classes, SEEN, rows))
    with pytest.raises(DoorError, match="squares: reference holds label 9"):
        scored()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--benchmarks", "imagenet"], "choose from .*scenes"),
        (["--limit", "0"], "at least 1"),
        (["--model", "nowhere"], "no such checkpoint folder"),
    ],
)
def test_bad_arguments_are_one_line(change, message, checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    given = ["--model", str(checkpoint), "--benchmarks", "scenes", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["run_eval.py", *given, *change])
    with pytest.raises(SystemExit) as exit_info:
        run_eval.main()
    text = str(exit_info.value.code) if isinstance(exit_info.value.code, str) else capsys.readouterr().err
    assert exit_info.value.code != 0
    assert len(text.splitlines()) == 1
    assert re.search(message, text)
    assert not output.exists()


def test_two_processes_score_scenes_as_one_does(checkpoint, tmp_path):
    door = [
        *("run_eval.py", "--model", checkpoint, "--benchmarks", "scenes", "--limit", 5, "--batch_size", 2),
        *("--size", 64, "--output"),
    ]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    running = {}
    for name, command in {"one": door, "two": [*launch, *door]}.items():
        environment = {
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            **{"HF_DATASETS_CACHE": str(tmp_path / f"cache_{name}"), "CUDA_VISIBLE_DEVICES": ""},
        }
        arguments = [sys.executable, *map(str, command), str(tmp_path / name)]
        pipe = subprocess.PIPE
        running[name] = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
        )
    for name, process in running.items():
        out, error = process.communicate(timeout=400)
        assert process.returncode == 0, (name, error[-2000:])
        assert out.count("| scenes | 5 |") == 1
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in running]
    assert results[0] == results[1]
    assert results[0]["benchmarks"]["scenes"]["num_images"] == 5
