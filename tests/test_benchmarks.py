"""The scripts in benchmarks/: all can be imported, and the measurement of speed measures every stage."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from modeling_ita import modeling_ita

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("class_logits", "ensemble_log_probs"):  # which the stopwatch of measure.py wraps
        monkeypatch.setattr(modeling_ita, name, getattr(modeling_ita, name))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_its_help(scripts, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_of_an_image_is_measured(scripts, monkeypatch, capsys, dtype):
    import torch

    measure = importlib.import_module("measure")
    threads = torch.get_num_threads()
    options = ["--clip", "RN50", "--height", "64", "--width", "64", "--classes", "3", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["measure.py", *options, "--threads", str(threads), "--dtype", dtype])
    monkeypatch.setenv("ITA_TEXT_CACHE", "off")
    measure.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dtype"] == dtype
    stages = {name: found["seconds"][name] for name in measure.STAGES}
    assert all(seconds > 0 for seconds in stages.values()), stages
    parts = sum(stages.values()) + found["seconds"]["rest"]
    assert parts == pytest.approx(found["seconds"]["total"])
    assert found["ratio"] == pytest.approx(found["seconds"]["total"] / found["seconds"]["float32 backbone"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("engines", ["--model", "nowhere", "--images", "a.png"], "no such checkpoint folder"),
        ("engines", ["--clip", "NOPE"], "open_clip knows no CLIP named 'NOPE'"),
        ("engines", ["--clip", "RN50", "--size", "50"], "must be a multiple of 32"),
        ("engines", ["--clip", "RN50", "--repeats", "0"], "must be an integer of at least 1"),
        ("mask_pooling", ["--heads", "nowhere", "--tune", "0"], "no such checkpoint folder"),
        (
            "mask_pooling",
            ["--adapters", "models/ita-tiny", "--tune", "0"],
            "--heads are hard, --adapters not",
        ),
        (
            "mask_pooling",
            ["--heads", "models/ita-tiny", "--upsample", "0"],
            "must be an integer of at least 1",
        ),
        ("large_image", ["--model", "nowhere"], "no such checkpoint folder"),
        ("large_image", ["--model", "models/ita-tiny", "--tile_overlap", "192"], "overlap"),
        ("postprocessing", ["--model", "nowhere", "--image", "a.png"], "no such checkpoint folder"),
        ("postprocessing", ["--model", "models/ita-tiny", "--image", "nowhere.png"], "nowhere.png"),
        ("speed", ["--clip", "NOPE"], "open_clip knows no CLIP named 'NOPE'"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(scripts, monkeypatch, capsys, name, arguments, message):
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_mask_pooling_keeps_the_weights_of_the_ensemble(scripts, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent)
    options = ["--heads", "models/ita-tiny", "--tune", "0", "--limit", "1", "--upsample", "4"]
    monkeypatch.setattr(sys, "argv", ["mask_pooling.py", *options])
    importlib.import_module("mask_pooling").main()
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (row["alpha"], row["beta"], row["pooling"]) == (0.6, 0.95, "hard, `dense_upsample` 4")
    assert 0 < row["miou"] <= 100


def test_post_processing_is_measured_beside_the_network(scripts, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent)
    options = ["--image", "models/ita-tiny/examples/scene_1.png", "--sizes", "400x300", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["postprocessing.py", "--model", "models/ita-tiny", *options])
    importlib.import_module("postprocessing").main()
    head, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert head[:3] == ["size", "network", "semantic"]
    assert row[0] == "400 x 300"
    assert all(float(seconds) > 0 for seconds in row[1:])
