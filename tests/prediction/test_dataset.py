"""A dataset into parquet: fixed units of work, any number of processes, ended at any time."""

import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from ita_segmentation.errors import ITAError
from ita_segmentation.prediction import rows
from ita_segmentation.prediction.parquet_parts import ParquetPart

datasets = pytest.importorskip("datasets")
UNIT_SIZE = 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(rows, "UNIT_SIZE", UNIT_SIZE)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20 + seed % 3, 30, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def folder_of(path: Path, count: int, broken: int | None = None) -> Path:
    for index in range(count):
        file = path / f"part {index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image" if index == broken else png(index))
    return path


def table_of(count: int, first: int = 0):
    features = datasets.Features({"photo": datasets.Image(), "name": datasets.Value("string")})
    images = [{"bytes": png(first + index), "path": None} for index in range(count)]
    names = [f"image {first + index}" for index in range(count)]
    return datasets.Dataset.from_dict({"photo": images, "name": names}, features=features)


def results(folder: Path) -> dict[str, dict]:
    found = [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]
    ids = [row["image_id"] for row in found]
    assert len(ids) == len(set(ids))
    return dict(zip(ids, found, strict=True))


def test_a_folder_becomes_a_row_for_each_image_at_any_depth(predict, tmp_path):
    source = folder_of(tmp_path / "in", 10)
    (source / "notes.txt").write_text("not looked at")
    assert predict("--dataset", source, "--output", tmp_path / "out", "--batch_size", 3) == 0
    found = results(tmp_path / "out")
    assert sorted(found) == sorted(f"part {index % 2}/{index:02d}.png" for index in range(10))
    row = found["part 1/05.png"]
    labels = np.array(Image.open(io.BytesIO(row["label_map"])))
    assert labels.shape == (row["height"], row["width"]) == (22, 30)
    assert {one["label_id"]: one["area"] for one in row["segments"]} == {
        int(one): int((labels == one).sum()) for one in np.unique(labels)
    }
    assert row["error"] is None
    files = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert files == ["00000-000000.parquet", "00000-000001.parquet", "00000-000002.parquet"]


def test_the_rows_are_what_single_images_give(predict, tmp_path):
    source = folder_of(tmp_path / "in", 2)
    given = ["--task", "panoptic", "--threshold", 0, "--format", "labels", "segments"]
    assert predict("--dataset", source, "--output", tmp_path / "out", *given) == 0
    assert predict("--images", source / "part 1" / "01.png", "--output", tmp_path / "single", *given) == 0
    row = results(tmp_path / "out")["part 1/01.png"]
    assert row["label_map"] == (tmp_path / "single" / "01_labels.png").read_bytes()
    document = json.loads((tmp_path / "single" / "01_segments.json").read_text())
    assert [one["label"] for one in row["segments"]] == [one["label"] for one in document["segments"]]


def test_a_broken_image_is_a_row_with_its_error(predict, tmp_path, capsys):
    source = folder_of(tmp_path / "in", 5, broken=2)
    assert predict("--dataset", source, "--output", tmp_path / "out", "--batch_size", 4) == 0
    found = results(tmp_path / "out")
    assert len(found) == 5
    row = found["part 0/02.png"]
    assert "is not an image" in row["error"]
    assert row["label_map"] is row["segments"] is None
    assert "5 images segmented, 1 of them with an error" in capsys.readouterr().out


def test_a_streamed_column_is_done_file_by_file_with_ids_of_a_column(predict, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    for part, count in enumerate((6, 3)):
        table_of(count, 10 * part).to_parquet(source / f"train-{part:05d}-of-00002.parquet")
    output = tmp_path / "out"
    given = ["--dataset", source, "--split", "train", "--image_column", "photo", "--id_column", "name"]
    assert predict(*given, "--output", output) == 0
    assert sorted(results(output)) == sorted(
        [f"image {index}" for index in range(6)] + [f"image {index}" for index in range(10, 13)]
    )
    names = ["00000-000000.parquet", "00000-000001.parquet", "00001-000000.parquet"]
    assert sorted(path.name for path in output.glob("*.parquet")) == names
    assert (output / "parts" / "00000").read_text() == "6\n"


def test_a_dataset_on_disk_is_read_by_row(predict, tmp_path):
    table_of(5).save_to_disk(tmp_path / "data")
    given = ["--dataset", tmp_path / "data", "--image_column", "photo", "--format", "coco"]
    assert predict(*given, "--output", tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert sorted(found) == ["0", "1", "2", "3", "4"]
    mask_utils = pytest.importorskip("pycocotools.mask")
    row = found["3"]
    size = [row["height"], row["width"]]
    areas = [int(mask_utils.area({"size": size, "counts": one["counts"]})) for one in row["run_lengths"]]
    assert areas == [one["area"] for one in row["run_lengths"]]
    assert sum(areas) == size[0] * size[1]
    assert row["label_map"] is None


@pytest.mark.parametrize("kind", ["folder", "one file", "two files", "a stream of another kind"])
def test_processes_share_the_work_and_another_number_of_them_goes_on(kind, predict, tmp_path, monkeypatch):
    if kind == "a stream of another kind":
        monkeypatch.setattr(rows, "_parquet_files", lambda builder, split: None)
    source = tmp_path / "in"
    given = ["--dataset", source]
    if kind == "folder":
        folder_of(source, 18)
    else:
        source.mkdir()
        parts = 2 if kind == "two files" else 1
        for part in range(parts):
            table_of(18 // parts, 50 * part).to_parquet(source / f"train-{part:05d}-of-{parts:05d}.parquet")
        given += ["--image_column", "photo", "--id_column", "name"]
    assert predict(*given, "--output", tmp_path / "whole") == 0
    output = tmp_path / "out"
    assert predict(*given, "--output", output, rank=1, world_size=2) == 0
    first = {path: path.read_bytes() for path in output.glob("*.parquet")}
    assert 0 < len(first) < len(list((tmp_path / "whole").glob("*.parquet")))
    for rank in range(3):
        assert predict(*given, "--output", output, rank=rank, world_size=3) == 0
    assert results(output) == results(tmp_path / "whole")
    assert all(path.read_bytes() == content for path, content in first.items())


@pytest.mark.parametrize(("group", "decoded"), [(64, 1.0), (100, 1.25), (256, 1.0), (1024, 2.5)])
def test_four_processes_read_each_row_of_one_file_once(group, decoded, tmp_path, monkeypatch):
    """With one row group, rows before a process's own are passed over by pyarrow: they never become Python objects."""
    monkeypatch.setattr(rows, "UNIT_SIZE", 256)
    images = [{"bytes": b"%d" % index, "path": None} for index in range(1024)]
    table = pyarrow.table({"image": images, "name": list(map(str, range(1024)))})
    parquet.write_table(table, tmp_path / "one.parquet", row_group_size=group)
    made, batches = [], []
    row_of, iter_batches = rows._row_of, parquet.ParquetFile.iter_batches

    def counted_row(*arguments):
        made.append(arguments)
        return row_of(*arguments)

    def counted_batches(*arguments, **options):
        for batch in iter_batches(*arguments, **options):
            batches.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(rows, "_row_of", counted_row)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted_batches)
    found = []
    for rank in range(4):
        opened = rows.open_rows(
            str(tmp_path / "one.parquet"), None, "image", "name", lambda part: None, lambda part, length: None
        )
        for unit in opened.units(rank, 4, lambda part, number: False):
            found += [(unit.number, row.number, row.image_id, row.image) for row in unit.rows]
    assert found == [(index // 256, index, str(index), b"%d" % index) for index in range(1024)]
    assert len(made) == 1024
    assert sum(batches) <= decoded * 1024


@pytest.mark.parametrize(("group", "world_size", "is_noted"), [(20, 2, True), (10, 2, False), (20, 1, False)])
def test_fewer_row_groups_than_processes_are_noted_once(
    group, world_size, is_noted, predict, tmp_path, capsys
):
    table_of(20).to_parquet(tmp_path / "data.parquet", batch_size=group)
    given = ["--dataset", tmp_path / "data.parquet", "--image_column", "photo", "--output", tmp_path / "out"]
    line = "note: 1 row group for 2 processes"
    for rank in range(world_size):
        assert predict(*given, rank=rank, world_size=world_size) == 0
        noted = capsys.readouterr().err
        assert (line in noted) == (is_noted and rank == 0)
        assert ("row_group_size=4 avoid this" in noted) == (is_noted and rank == 0)
    assert len(results(tmp_path / "out")) == 20


def test_processes_without_work_are_noted(predict, tmp_path, capsys):
    table_of(6).to_parquet(tmp_path / "data.parquet")
    given = ["--dataset", tmp_path / "data.parquet", "--image_column", "photo", "--output", tmp_path / "out"]
    assert predict(*given, rank=0, world_size=3) == 0
    assert "make 2 units of 4: 1 of 3 processes have nothing to do" in capsys.readouterr().err


def test_parquet_rows_are_read_from_any_row_on_across_files_of_any_scheme(tmp_path):
    files = []
    for index, (count, group) in enumerate([(7, 3), (0, 1), (50, 50), (2, 1)]):
        file = str(tmp_path / f"{index}.parquet") if index % 2 else f"memory://rows/{index}.parquet"
        table = pyarrow.table({"n": pyarrow.array(range(100 * index, 100 * index + count), pyarrow.int64())})
        with fsspec.open(file, "wb") as stream:
            parquet.write_table(table, stream, row_group_size=group)
        files.append(file)
    expected = [*range(7), *range(200, 250), 300, 301]
    part = ParquetPart(files, ["n"])
    assert part.num_rows == 59
    for start, stop in [(0, 4), (4, 8), (30, 40), (5, 57), (57, 99), (58, 58), (2, 3), (0, 59)]:
        assert [row["n"] for row in part.rows(start, stop)] == expected[start:stop]


def test_a_file_that_is_empty_or_cut_off_is_not_done(predict, tmp_path):
    source, output = folder_of(tmp_path / "in", 10), tmp_path / "out"
    assert predict("--dataset", source, "--output", output) == 0
    before = results(output)
    (output / "00000-000000.parquet").write_bytes(b"")
    cut = output / "00000-000001.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert predict("--dataset", source, "--output", output) == 0
    assert results(output) == before


def test_what_a_killed_process_leaves_is_replaced(predict, tmp_path):
    source, output = folder_of(tmp_path / "in", 3), tmp_path / "out"
    assert predict("--dataset", source, "--output", output) == 0
    (output / "00000-000000.parquet").rename(output / ".00000-000000.parquet.tmp")
    assert predict("--dataset", source, "--output", output) == 0
    assert len(results(output)) == 3
    assert not list(output.glob(".*"))


def test_one_bad_url_in_a_column_is_a_row_with_its_error(predict, tmp_path):
    class Rude(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(b"ICY 200 OK\r\n\r\n" if "status" in self.path else b"")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rude)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    urls = [
        f"{address}/status",
        f"{address}/empty",
        "http://127.0.0.1:99999999/a.png",
        "http://[::1/a.png",
        "",
        None,
    ]
    paths = [*urls, str(tmp_path / "good.png")]
    (tmp_path / "good.png").write_bytes(png(0))
    datasets.Dataset.from_dict({"url": paths}).to_parquet(tmp_path / "urls.parquet")
    try:
        given = [
            "--dataset",
            tmp_path / "urls.parquet",
            "--image_column",
            "url",
            "--output",
            tmp_path / "out",
        ]
        assert predict(*given) == 0
    finally:
        server.shutdown()
    found = [
        row for path in (tmp_path / "out").glob("*.parquet") for row in parquet.read_table(path).to_pylist()
    ]
    assert [row["error"] is None for row in sorted(found, key=lambda row: row["row"])] == [False] * 6 + [True]


def test_a_part_that_is_done_is_not_read_again(predict, tmp_path, monkeypatch, capsys):
    source = tmp_path / "in"
    source.mkdir()
    table_of(6).to_parquet(source / "train-00000-of-00001.parquet")
    given = ["--dataset", source, "--image_column", "photo", "--output", tmp_path / "out"]
    assert predict(*given) == 0
    read = []
    monkeypatch.setattr(rows, "_row_of", lambda *arguments: read.append(arguments))
    assert predict(*given) == 0
    assert read == []
    assert "0 images segmented" in capsys.readouterr().out


def test_a_folder_of_another_run_is_left_alone(predict, tmp_path):
    source = folder_of(tmp_path / "in", 3)
    given = ["--dataset", source, "--output", tmp_path / "out"]
    assert predict(*given) == 0
    before = results(tmp_path / "out")
    with pytest.raises(ITAError, match="another run .different: .*vocabulary"):
        predict(*given, "--classes", "cat, dog")
    folder_of(source, 4)
    with pytest.raises(ITAError, match="digest, images"):
        predict(*given)
    assert results(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "{tmp}/empty"], "no images in the folder"),
        (["--dataset", "{tmp}/data", "--image_column", "image"], "no column 'image': it has photo, name"),
        (["--dataset", "{tmp}/data", "--split", "test"], "no split 'test'.*train"),
        (["--dataset", "{tmp}/broken.parquet"], "cannot be read"),
        (["--dataset", "{tmp}/empty", "--format", "overlay"], "not overlay"),
        (["--dataset", "{tmp}/empty", "--every", "2"], "--every is for videos"),
        (["--images", "{tmp}/empty", "--split", "train"], "--split is for --dataset"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(arguments, message, predict, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    table_of(2).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(ITAError, match=message):
        predict(*(one.format(tmp=tmp_path) for one in arguments), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


SLOW_COMMAND = """
import sys, time
sys.path.insert(0, {root!r})
from ita_segmentation.prediction import rows, segmenter
rows.UNIT_SIZE = 4
segment = segmenter.Segmenter.segment_images
def slow(self, images):
    time.sleep({seconds})
    return segment(self, images)
segmenter.Segmenter.segment_images = slow
from ita_segmentation.cli.main import run_by_name
run_by_name("predict")
"""


@pytest.mark.slow
def test_two_processes_that_are_killed_lose_nothing(checkpoint, predict, tmp_path):
    source, output = folder_of(tmp_path / "in", 24, broken=9), tmp_path / "out"
    command_file = tmp_path / "predict.py"
    command_file.write_text(SLOW_COMMAND.format(root=str(ROOT), seconds=0.3))
    # What `accelerate launch` runs for several processes; of CPUs it makes but one.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = ["--dataset", str(source), "--output", str(output), "--task", "panoptic"]
    command = [
        sys.executable,
        *launch,
        str(command_file),
        "--model",
        str(checkpoint),
        *given,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    while len(list(output.glob("0*.parquet"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline, "no unit was written"
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    for one in (process, *workers):
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(workers, timeout=10)
    left = {path: path.read_bytes() for path in output.glob("0*.parquet")}
    assert 2 <= len(left) < 6
    assert all(parquet.read_table(path).num_rows == 4 for path in left)

    assert predict(*given) == 0
    assert len(results(output)) == 24
    assert all(path.read_bytes() == content for path, content in left.items())
    assert not list(output.glob(".*"))
    assert predict("--dataset", source, "--output", tmp_path / "whole", "--task", "panoptic") == 0
    assert results(output) == results(tmp_path / "whole")
