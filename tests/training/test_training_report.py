"""The report of a run: what a tiny run leaves, the numbers of the page, long curves, sample images, bad input."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerState

from helpers import training_runs
from ita_segmentation.cli import train as run_train
from ita_segmentation.training import report
from ita_segmentation.training.history import curve, read_history
from ita_segmentation.training.report_chart import downsample
from ita_segmentation.training.report_record import RunRecord, read_record
from ita_segmentation.training.report_samples import draw_samples, sample_files, samples_of
from modeling_ita import ITAImageProcessor

NAMES = ["<b>box</b>", "wall & <script>alert(1)</script>"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output folder of a run of four steps on two classes with HTML in their names, evaluated after two."""
    folder = tmp_path_factory.mktemp("report")
    changes = {"max_steps": 4, "save_steps": 3, "logging_steps": 1, "eval_steps": 2, "sample_images": 2}
    words = training_runs.make_world(folder, report_to="tensorboard", **changes)
    saved = datasets.load_from_disk(folder / "data")
    features = saved["train"].features | {"classes": datasets.List(datasets.ClassLabel(names=NAMES))}
    saved.cast(datasets.Features(features)).save_to_disk(folder / "renamed")
    output = folder / "out"
    run_train.main([*words, "--dataset", str(folder / "renamed"), "--output_dir", str(output)])
    return output


class Page(HTMLParser):
    """What a browser would take from a page: tags, addresses, and the curves under the pointer."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.curves: dict[str, dict[int, float]] = {}
        self.words = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if "data-content" in values:
            for line in json.loads(values["data-content"])["curves"]:
                points = dict(zip(line["steps"], line["values"], strict=True))
                self.curves.setdefault(line["name"], points)

    def handle_data(self, data):
        self.words += data


def page_of(output: Path) -> Page:
    return Page((output / report.REPORT).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------
# A real run


@pytest.mark.parametrize(
    ("shown", "logged"),
    [
        ("loss", "loss"),
        ("learning rate", "learning_rate"),
        ("gradient norm", "grad_norm"),
        ("images per second", "images_per_second"),
        ("all classes", "eval_miou"),
        ("of matched queries that are text queries", "matched_text_queries"),
        ("after layer 1", "loss_ce_1"),
        ("last layer", "loss_ce"),
    ],
)
def test_the_curves_have_the_logged_numbers(finished, shown, logged):
    points = dict(zip(*curve(read_history(finished), logged), strict=True))
    assert points
    assert page_of(finished).curves[shown] == pytest.approx(points, rel=1e-5)


def test_the_page_is_complete_in_itself_and_runs_no_class_name(finished):
    page = page_of(finished)
    assert page.addresses and all(address.startswith("data:") for address in page.addresses)
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert all(name in page.words for name in NAMES)
    assert (finished / report.REPORT).stat().st_size < 2_000_000


def test_what_happened_and_with_what_is_told(finished):
    record = read_record(finished)
    events = [event["what"] for event in record.events]
    assert events == ["started", "checkpoint-3 saved", "checkpoint-4 saved", "finished"]
    assert record.arguments["learning_rate"] == "0.001" and record.data["training images"] == "10"
    page = page_of(finished)
    assert "checkpoint-3 saved" in page.words and record.versions["torch"] in page.words


def test_each_evaluation_leaves_sample_images_also_in_tensorboard(finished):
    files = sample_files(finished)
    assert list(files) == [2, 4]
    with Image.open(files[4]) as image:
        assert image.format == "JPEG" and image.width > 3 * 200
    assert any(b"samples" in file.read_bytes() for file in finished.glob("runs/*/events*"))
    assert page_of(finished).tags.count("img") == 2
    assert not list(finished.rglob(".unfinished-*"))


def test_the_report_of_a_broken_off_run_is_made_from_its_last_checkpoint(finished, tmp_path, capsys):
    output = tmp_path / "killed"
    (output / "checkpoint-3").mkdir(parents=True)
    state = (finished / "checkpoint-3" / "trainer_state.json").read_text()
    (output / "checkpoint-3" / "trainer_state.json").write_text(state)
    report.main([str(output)])
    assert capsys.readouterr().out.strip() == str(output / report.REPORT)
    page = page_of(output)
    assert max(page.curves["loss"]) == 3 and "3 of 4" in page.words and "time left" in page.words


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"log_history": [{"loss": 1.0}]}', '{"log_history": 5}', "\x00"]
)
def test_a_damaged_state_is_answered_in_one_line(tmp_path, capsys, content):
    (tmp_path / "trainer_state.json").write_text(content)
    if content == "{}":  # a run that has not begun
        report.main([str(tmp_path)])
        assert page_of(tmp_path).curves == {}
        return
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "trainer_state.json is damaged" in line and line.count("\n") == 1
    assert not (tmp_path / report.REPORT).exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}', '{"events": [{}]}', '{"arguments": [1]}'])
def test_a_damaged_record_is_answered_in_one_line(finished, tmp_path, capsys, content):
    (tmp_path / "trainer_state.json").write_bytes((finished / "trainer_state.json").read_bytes())
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    line = capsys.readouterr().err
    assert "run.json is damaged" in line and line.count("\n") == 1


def test_a_folder_of_no_run_is_refused_in_one_line(tmp_path, capsys):
    for words in ([str(tmp_path)], []):
        with pytest.raises(SystemExit) as stop:
            report.main(words)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_whose_loss_is_no_number_still_leaves_its_report(tmp_path, monkeypatch):
    words = training_runs.make_world(tmp_path, max_steps=4, logging_steps=1, eval_strategy="no")
    original = run_train.ITATrainer.compute_loss

    def poisoned(self, *arguments, **keywords):
        factor = math.nan if self.state.global_step == 2 else 1.0
        return factor * original(self, *arguments, **keywords)

    monkeypatch.setattr(run_train.ITATrainer, "compute_loss", poisoned)
    with pytest.raises(SystemExit):
        run_train.main([*words, "--output_dir", str(tmp_path / "out")])
    page = page_of(tmp_path / "out")
    assert "no number at step 3" in page.words
    assert set(page.curves["loss"]) == {1, 2}


def test_a_disk_that_cannot_be_written_costs_the_report_and_not_the_run(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ita_segmentation.training.report_callback.write_whole", refuse)
    monkeypatch.setattr("ita_segmentation.training.report.write_whole", refuse)
    words = training_runs.make_world(tmp_path, max_steps=1, save_strategy="no")
    run_train.main([*words, "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / report.REPORT).exists()
    assert "the run goes on" in caplog.text


def test_a_gradient_that_is_no_number_ends_two_processes_and_the_first_one_tells(tmp_path):
    words = training_runs.make_world(
        tmp_path, logging_steps=1, eval_steps=1, sample_images=2, save_strategy="no"
    )
    words += ["--learning_rate", "1e38", "--max_grad_norm", "1e38", "--lr_scheduler_type", "constant"]
    words += ["--warmup_steps", "0", "--output_dir", str(tmp_path / "out")]
    log = tmp_path / "log"
    assert training_runs.finish(training_runs.start(words, log, 2), 120.0) == [1, 1]
    assert log.read_text().count("no number at step 2") == 1
    assert [event["step"] for event in read_record(tmp_path / "out").events] == [0, 2]
    assert "no number at step 2" in page_of(tmp_path / "out").words
    assert list(sample_files(tmp_path / "out")) == [1]


# ------------------------------------------------------------------------------------------------------------
# Curves


def test_a_long_curve_keeps_its_ends_and_extremes():
    values = np.random.default_rng(0).normal(size=7375).tolist()
    values[1234], values[5000] = 50.0, -50.0
    kept = downsample(range(7375), values, 600)
    assert len(kept) <= 600 and kept == sorted(set(kept)) and {0, 1234, 5000, 7374} <= set(kept)
    assert max(np.diff(kept)) < 2 * 7375 / 299
    assert downsample([3, 9], [1.0, 2.0], 600) == [0, 1]


def test_three_days_make_a_page_below_two_megabytes_with_all_samples(tmp_path):
    """As many entries and names as the published recipe logs."""
    rng = np.random.default_rng(0)
    layers = [
        f"{part}{suffix}"
        for part in report.LOSS_PARTS
        for suffix in ("", "_sum", *map("_{}".format, range(9)))
    ]
    names = ["loss", "learning_rate", "grad_norm", "images_per_second", "memory_gib", "minutes", *layers]
    history = [
        {"step": step, **dict(zip(names, rng.normal(5, 1, len(names)).tolist(), strict=True))}
        for step in range(50, 368_751, 50)
    ]
    (tmp_path / "samples").mkdir()
    for step in range(5000, 368_751, 5000):
        history.append({"step": step, "eval_miou": 0.5})
        noise = (
            rng.integers(0, 256, (600, 1300, 3), np.uint8)
            if step % 50_000 == 0
            else np.zeros((6, 9, 3), np.uint8)
        )
        Image.fromarray(noise).save(tmp_path / "samples" / f"step-{step}.jpg")
    state = TrainerState(global_step=368_750, max_steps=368_750, log_history=history)
    record = RunRecord(events=[{"time": "now", "step": s, "what": "checkpoint saved"} for s in range(2000)])
    file = report.write_report(tmp_path, state, record)
    page = page_of(tmp_path)
    assert file.stat().st_size < 2_000_000
    assert page.tags.count("img") == 6 and "and 1900 more" in page.words
    assert max(len(points) for points in page.curves.values()) <= 1000
    assert page.curves["loss"].keys() >= {50, 368_750}


def test_numbers_that_are_none_are_left_out_and_counted(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    history += [{"step": 4, "loss": 0.0}, {"step": 4, "loss": -1.0}]
    report.write_report(tmp_path, TrainerState(log_history=history, max_steps=4), RunRecord())
    page = page_of(tmp_path)
    assert page.curves["loss"] == {1: 2.0, 4: -1.0}
    assert "2 logged values are no number" in page.words
    assert not re.search(r"\b(nan|inf)\b", page.words.lower().split("written")[0])


# ------------------------------------------------------------------------------------------------------------
# Sample images


def test_a_sample_shows_the_image_as_it_was_without_padding():
    processor = ITAImageProcessor()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 210, 105), np.uint8))
    batch = {"inputs": dict(processor(images=[pixels], do_resize=False, return_tensors="pt"))}
    batch |= {"labels": [np.zeros((210, 105), np.int64)], "image_names": ["one"]}
    assert batch["inputs"]["pixel_values"].shape[-1] > 105
    (sample,) = samples_of(batch, [torch.ones(210, 105, dtype=torch.int64)], [7], processor)
    assert (sample.place, sample.name) == (7, "one")
    assert np.array_equal(sample.image, pixels.permute(1, 2, 0).numpy())
    assert (sample.prediction == 1).all() and (sample.truth == 0).all()


def test_a_drawing_says_what_was_missed_and_leaves_ignored_pixels_unpainted():
    truth = np.full((210, 210), 255)
    truth[:100] = 0
    batch = {
        "inputs": {"pixel_values": torch.zeros(1, 3, 210, 210), "pixel_mask": torch.ones(1, 210, 210)},
        "labels": [truth],
        "image_names": ["a <image>"],
    }
    samples = samples_of(batch, [torch.ones(210, 210, dtype=torch.int64)], [0], ITAImageProcessor())
    drawn = np.asarray(draw_samples(samples, ["sky", "dog"], 255, "step 1"))
    left = 2 * (210 + 8)  # the third image
    bottom = drawn[-8 - 100 : -8, left : left + 210]
    assert np.ptp(bottom[1:, :-1].astype(int), axis=-1).max() == 0  # grey: nothing painted
    top = drawn[-8 - 205 : -8 - 150, left : left + 210]
    assert np.ptp(top.astype(int), axis=-1).min() > 20
