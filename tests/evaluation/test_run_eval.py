"""`ita eval`: the same numbers whatever the batches, processes and interruptions."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.prepared_squares import IGNORE, SIZES, row, save_rows, save_squares
from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.cli import eval as run_eval
from ita_segmentation.cli.eval_options import ModelUnderTest
from ita_segmentation.cli.main import run_by_name
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation import (
    Benchmark,
    EvalConfig,
    ImagePrediction,
    Instances,
    ITAPredictor,
    evaluate_benchmark,
)
from ita_segmentation.evaluation.predictors import EVALUATION_TASKS

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "models" / "ita-tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_squares(folder / "squares")
    return folder


@pytest.fixture(autouse=True)
def a_new_process():
    """accelerate's precision is set once for a process, and each test is a run of its own."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def scored(checkpoint, data, tmp_path):
    """Run the command on the squares; return their scores and the confusion matrix."""

    def run(
        *arguments, benchmark: str = "squares", folder: Path = data, model: Path = checkpoint
    ) -> tuple[dict, np.ndarray]:
        output = tmp_path / f"out_{len(list(tmp_path.iterdir()))}"
        given = ["--model", model, "--benchmarks", benchmark, "--data_dir", folder, "--output", output]
        given += ["--num_report_images", 0]
        assert run_eval.evaluate([str(argument) for argument in [*given, *arguments]]) == 0
        assert not (output / ".progress").exists() or not list((output / ".progress").iterdir())
        return read(output, benchmark)

    return run


def read(output: Path, benchmark: str = "squares") -> tuple[dict, np.ndarray]:
    results = json.loads((output / "results.json").read_text())["benchmarks"][benchmark]
    return results, np.load(output / benchmark / "confusion.npz")["confusion"]


def images(folder: Path) -> list[tuple[Image.Image, np.ndarray]]:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")
    return [(one["image"].convert("RGB"), np.array(one["label"])) for one in rows]


def test_scores_are_those_of_one_matrix_over_all_images(scored, checkpoint, data):
    model, processor = load_checkpoint(checkpoint, "cpu")
    expected = np.zeros((4, 4), int)
    for image, reference in images(data / "squares"):
        with torch.inference_mode():
            outputs = model(**processor(images=image, return_tensors="pt"))
        prediction = processor.post_process_semantic_segmentation(outputs, target_sizes=[reference.shape])[0]
        for one, other in zip(reference.ravel(), prediction.numpy().ravel(), strict=True):
            if one != IGNORE:
                expected[one, other] += 1
    iou = np.diag(expected) / (expected.sum(0) + expected.sum(1) - np.diag(expected))
    scores, matrix = scored()
    assert np.array_equal(matrix, expected)
    assert scores["num_images"] == len(SIZES)
    assert scores["miou"] == pytest.approx(iou.mean())
    assert scores["miou_seen"] == pytest.approx(iou[:2].mean())  # the checkpoint's training names
    assert scores["miou_unseen"] == pytest.approx(iou[2:].mean())
    assert [entry["iou"] for entry in scores["classes"]] == pytest.approx(iou.tolist())
    assert [entry["is_thing"] for entry in scores["classes"]] == [False, True, False, True]
    assert {"pq", "sq", "rq", "ap", "ap50"} <= set(scores)
    assert [scores[f"{task}_num_classes_counted"] for task in ("panoptic", "instance")] == [4, 2]
    assert scores["miou_with_predicted"] == scores["miou"]


class Oracle:
    """Predict the labels, moved to the right by some columns (the first column repeated)."""

    tasks, seen = frozenset(EVALUATION_TASKS), None
    notes = ()

    def __init__(self, folder: Path, columns: int) -> None:
        import datasets

        rows = datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")
        self.answers = {np.array(one["image"].convert("RGB")).tobytes(): one for one in rows}
        self.columns = columns

    def moved(self, values: np.ndarray) -> np.ndarray:
        first = np.repeat(values[:, :1], self.columns, axis=1)
        return np.concatenate([first, values[:, : values.shape[1] - self.columns]], axis=1)

    def __call__(self, images: Any, sizes: Any, tasks: Any) -> list[ImagePrediction]:
        found = []
        for image in images:
            answer = self.answers[np.array(image).tobytes()]
            channels = np.array(answer["panoptic"]).astype(np.int32)
            segments = self.moved(channels @ np.array([1, 256, 65536], np.int32))
            label = self.moved(np.array(answer["label"]))
            things = [one for one in answer["segments"] if one["isthing"]]
            found.append(
                ImagePrediction(
                    semantic=np.where(label == IGNORE, 0, label),
                    panoptic=segments,
                    segments=[
                        {"id": one["id"], "label_id": one["category_id"]} for one in answer["segments"]
                    ],
                    instances=Instances(
                        scores=np.full(len(things), 0.5),
                        labels=np.array([one["category_id"] for one in things], dtype=np.int64),
                        masks=np.array([segments == one["id"] for one in things]).reshape(-1, *label.shape),
                    ),
                )
            )
        return found


@pytest.fixture
def half_and_half(tmp_path) -> Path:
    """Images of ten columns: three of sky and seven of one dog, and a row without a label."""
    rng = np.random.default_rng(1)
    rows = []
    for index in range(3):
        segments = np.full((11, 10), 7, np.int32)
        segments[:, 3:] = 9
        segments[0] = 0
        rows.append(
            row(f"halves_{index}", rng.integers(0, 255, (11, 10, 3), np.uint8), segments, {7: 0, 9: 1})
        )
    save_rows(tmp_path / "data" / "halves", rows)
    return tmp_path / "data"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_perfect_predictor_scores_one(scored, half_and_half, monkeypatch, batch_size):
    monkeypatch.setattr(ModelUnderTest, "predictor", lambda *_: Oracle(half_and_half / "halves", 0))
    scores, matrix = scored("--batch_size", batch_size, benchmark="halves", folder=half_and_half)
    assert [scores[name] for name in ("miou", "pacc", "pq", "sq", "rq", "ap", "ap50", "ap75")] == [1.0] * 8
    assert np.array_equal(matrix, np.diag([90, 210, 0, 0]))


def test_a_shifted_predictor_scores_what_is_worked_out_by_hand(scored, half_and_half, monkeypatch):
    # Two columns to the right: sky is predicted in 5 columns, 3 of them right: 3 / 5. The dog is predicted in 5
    # columns, all of them the dog's, which has 7: 5 / 7 = 0.714, a match at IoU 0.50, 0.55, 0.60, 0.65 and 0.70.
    monkeypatch.setattr(ModelUnderTest, "predictor", lambda *_: Oracle(half_and_half / "halves", 2))
    scores, _ = scored(benchmark="halves", folder=half_and_half)
    both = (3 / 5 + 5 / 7) / 2
    assert scores["miou"] == pytest.approx(both)
    assert scores["pacc"] == pytest.approx(8 / 10)
    assert [scores["pq"], scores["sq"], scores["rq"]] == pytest.approx([both, both, 1])
    assert [scores["pq_things"], scores["pq_stuff"]] == pytest.approx([5 / 7, 3 / 5])
    assert [scores["ap"], scores["ap50"], scores["ap75"]] == pytest.approx([0.5, 1, 0])


def test_batches_of_any_size_score_alike(scored):
    one, many = scored("--batch_size", 1)[1], scored("--batch_size", 3)[1]
    assert np.abs(one - many).sum() <= 1e-3 * one.sum()


def test_limit_size_and_tasks_are_respected(scored):
    scores, _ = scored("--limit", 2, "--tasks", "semantic", "--size", 72)
    assert scores["num_images"] == 2
    assert scores["tasks"] == ["semantic"]
    assert "pq" not in scores
    assert scores["settings"]["shortest_side"] == 72
    assert scores["settings"]["longest_side"] == 144


def test_windows_scales_flips_and_precision_change_the_prediction_and_are_recorded(scored):
    from accelerate.state import AcceleratorState

    plain = scored("--tasks", "semantic", "--limit", 1, model=SHIPPED)[1]
    for arguments, name, value in [
        (["--sliding_window", 96, "--stride", 64], "sliding_window", 96),
        (["--tta", "--tta_scales", 0.5], "tta", [0.5]),
        (["--mixed_precision", "bf16"], "precision", "bf16"),
    ]:
        AcceleratorState._reset_state(reset_partial_state=True)
        scores, matrix = scored("--tasks", "semantic", "--limit", 1, *arguments, model=SHIPPED)
        assert matrix.sum() == plain.sum()
        assert not np.array_equal(matrix, plain)
        assert scores["settings"][name] == value


def test_other_class_names_and_templates_change_the_prediction(scored, tmp_path):
    plain = scored("--limit", 1, "--tasks", "semantic", model=SHIPPED)[1]
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("0:invalid_class_id\n1:sky,heaven\n2:dog,hound\n3:grass\n4:car\n")
    templates.write_text("a bad photo of a {}.\n\n{} in a scene\n")
    for arguments in (["--vocabulary", names], ["--templates", templates], ["--templates", "none"]):
        assert not np.array_equal(
            scored("--limit", 1, "--tasks", "semantic", *arguments, model=SHIPPED)[1], plain
        )


def test_files_of_a_run(checkpoint, data, tmp_path):
    output = tmp_path / "out"
    given = ["--model", checkpoint, "--benchmarks", "squares", "scenes", "--data_dir", data, "--limit", 3]
    run_eval.evaluate([str(argument) for argument in [*given, "--size", 64, "--output", output]])
    results = json.loads((output / "results.json").read_text())
    assert list(results["benchmarks"]) == ["squares", "scenes"]
    assert results["benchmarks"]["scenes"]["num_images"] == 3
    names = {path.name for path in output.iterdir()}
    assert {"results.json", "results.md", "report.html", "model_index.yaml", "squares", "scenes"} <= names
    report = (output / "report.html").read_text()
    assert "square_" in report
    assert not list(output.rglob("*.tmp"))


def command(checkpoint: Path, data: Path, output: Path, *arguments: Any, processes: int = 1) -> list[str]:
    launch: list[Any] = []
    if processes > 1:
        # What `accelerate launch` runs for several processes; with `--cpu` it would start but one.
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    given = ["--model", checkpoint, "--benchmarks", "squares", "--data_dir", data, "--output", output]
    return [sys.executable, *map(str, [*launch, "run_eval.py", *given, *arguments])]


def start(arguments: list[str], **changes: Any) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, **changes
    )


def without_the_run(results: dict) -> dict:
    changing = ("seconds", "processes", "images_per_second")
    settings = {name: value for name, value in results["settings"].items() if name not in changing}
    return {**results, "settings": settings}


def test_a_killed_evaluation_resumed_on_three_processes_scores_as_one_process_does_to_the_last_bit(
    checkpoint, scored, tmp_path
):
    count = 24
    save_squares(tmp_path / "data" / "squares", count)
    arguments = command(checkpoint, tmp_path / "data", tmp_path / "cut", "--save_seconds", 0)
    process = start(arguments, start_new_session=True)
    parts = tmp_path / "cut" / ".progress"
    deadline = time.monotonic() + 300
    while not list(parts.glob("*/part-*.npz")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (part,) = parts.glob("*/part-*.npz")
    done = len(np.load(part)["batches.done"])
    assert 0 < done < count
    assert not (tmp_path / "cut" / "results.json").exists()

    resumed = start(command(checkpoint, tmp_path / "data", tmp_path / "cut", processes=3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, expected_matrix = scored(folder=tmp_path / "data")
    torch.set_num_threads(threads)
    out, error = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, error[-2000:]
    assert out.count("Scores in percent") == 1  # one process prints
    scores, matrix = read(tmp_path / "cut")
    assert np.array_equal(matrix, expected_matrix)
    assert (scores["settings"]["processes"], expected["settings"]["processes"]) == (3, 1)
    assert without_the_run(scores) == without_the_run(expected)
    assert f"{done}/{count}" in error.replace(" ", "")  # the bar starts where the first run was
    assert not list(parts.glob("*"))


def test_counts_of_another_model_dataset_or_setting_are_never_continued(
    checkpoint, data, tmp_path, monkeypatch
):
    class StoppedError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StoppedError

    def run(*more: Any, model: Path = checkpoint, folder: Path = data) -> None:
        given = [
            "--model",
            model,
            "--benchmarks",
            "squares",
            "--data_dir",
            folder,
            "--output",
            tmp_path / "out",
        ]
        run_eval.evaluate(
            [*map(str, given), "--save_seconds", "0", "--num_report_images", "0", *map(str, more)]
        )

    with monkeypatch.context() as patch:
        patch.setattr("ita_segmentation.evaluation.reporting.examples.worst_and_best", stop)
        with pytest.raises(StoppedError):
            run()
    other_model = save_tiny_checkpoint(tmp_path / "model", train_vocabulary=["sky"])
    save_squares(tmp_path / "data" / "squares", 4)
    for change, changed in (
        ({"model": other_model}, "model"),
        ({"folder": tmp_path / "data"}, "dataset"),
        ({"more": ["--size", 72]}, "shortest_side"),
    ):
        with pytest.raises(ITAError, match=f"interrupted run with another {changed}; --restart deletes"):
            run(*change.pop("more", ()), **change)
    predicted = []
    monkeypatch.setattr(ITAPredictor, "__call__", lambda _, images, *__: predicted.extend(images))
    run()
    assert not predicted  # everything had been counted
    assert not list((tmp_path / "out" / ".progress").iterdir())


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (["--benchmarks", "imagenet"], 1, "there is no prepared dataset .*imagenet"),
        (["--limit", "0"], 2, "at least 1"),
        (["--model", "nowhere"], 1, "nowhere"),
        (["--split", "test"], 1, "test"),
        (["--stride", "3"], 2, "--stride needs --sliding_window"),
        (["--tta_scales", "1"], 2, "--tta_scales needs --tta"),
        (["--tta", "--tta_scales", "-1"], 1, "scales must be numbers above 0"),
        (["--sliding_window", "--tasks", "panoptic"], 2, "semantic task only"),
        (["--templates", "nowhere.txt"], 1, "nowhere.txt"),
        (["--vocabulary", "nowhere.txt"], 1, "nowhere.txt"),
        (["--longest_side", "5"], 2, "--longest_side needs --size"),
        (["--benchmarks", "scenes", "--split", "train"], 1, "scenes has no split 'train'"),
        (["--vocabulary", "nix=words.txt"], 2, "nix is none of the benchmarks squares"),
        (["--sliding_window", "64", "--stride", "65"], 2, "--stride 65 is above"),
    ],
)
def test_bad_arguments_are_one_line(change, status, message, checkpoint, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    given = ["--model", checkpoint, "--benchmarks", "squares", "--data_dir", data, "--output", output]
    monkeypatch.setattr("sys.argv", ["run_eval.py", *map(str, given), *change])
    with pytest.raises(SystemExit) as exit_info:
        run_by_name("eval")
    text = capsys.readouterr().err
    assert exit_info.value.code == status
    assert len(text.splitlines()) == 1
    assert re.search(message, text)
    assert not output.exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1:sky\n2:dog\n", "2 classes, the benchmark 4"),
        ("1:dog\n2:sky\n3:grass\n4:car\n", "another order: its class 0 is 'dog'"),
    ],
)
def test_names_for_other_classes_are_refused(scored, tmp_path, lines, message):
    names = tmp_path / "names.txt"
    names.write_text(lines)
    with pytest.raises(ITAError, match=message):
        scored("--vocabulary", names)


def png_of(label: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("image", "image square_1 cannot be scored: .*truncated"),
        ("size", r"image square_1 cannot be scored: .*label map is \(70, 70\), its image \(64, 48\)"),
        ("label", "image square_1: reference holds label 9"),
    ],
)
def test_a_bad_image_is_named(scored, tmp_path, kind, message):
    import datasets

    source = save_squares(tmp_path / "good")
    dataset = datasets.load_dataset("parquet", data_files=str(source / "data" / "*.parquet"), split="train")
    for column in ("image", "label", "panoptic"):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    rows = [dict(one) for one in dataset]
    if kind == "image":
        rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:200], "path": None}
    elif kind == "size":
        rows[1]["label"] = rows[2]["label"]
    else:
        rows[1]["label"] = png_of(np.full(SIZES[1], 9, np.uint8))
    save_rows(tmp_path / "data" / "bad", rows)
    with pytest.raises(ITAError, match=message):
        scored(benchmark="bad", folder=tmp_path / "data")


def test_a_dataset_without_a_labeled_pixel_or_without_images_is_refused(scored, tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    save_rows(tmp_path / "data" / "ignored", [row("blank", image, np.zeros((40, 40), np.int32), {})])
    with pytest.raises(ITAError, match="ignored has no labeled pixel"):
        scored("--tasks", "semantic", benchmark="ignored", folder=tmp_path / "data")
    empty = Benchmark(classes=[["sky"]], rows=list, decode=dict, num_images=0)
    with pytest.raises(ITAError, match="nothing has no images"):
        evaluate_benchmark(None, empty, EvalConfig(), title="nothing")


def test_a_model_whose_output_is_nan_is_refused(scored, checkpoint, monkeypatch):
    model, processor = load_checkpoint(checkpoint, "cpu")
    with torch.no_grad():
        model.image_text_aggregation.learned_queries.fill_(float("nan"))
    predictor = ITAPredictor(model, processor, [[name] for name in ("sky", "dog", "grass", "car")])
    monkeypatch.setattr(ModelUnderTest, "predictor", lambda *_: predictor)
    with pytest.raises(ITAError, match="image square_0 cannot be segmented: .*NaN"):
        scored()
