"""What an evaluation writes: tables, published scores, classes, confusions, images, and the page with all of it."""

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.reporting import html_report
from ita_segmentation.evaluation.reporting.confusion_matrix import (
    classes_to_draw,
    confusion_image,
    worst_confusions,
)
from ita_segmentation.evaluation.reporting.examples import ExampleImage, example_image, side_by_side
from ita_segmentation.evaluation.reporting.published_scores import PUBLISHED
from ita_segmentation.evaluation.reporting.report import folder_names, summary_table, write_results
from ita_segmentation.evaluation.reporting.score_tables import comparison_note, published_table
from ita_segmentation.visualization import color_of

NAN = math.nan
NASTY = [
    "<script>alert(1)</script>",
    "a|b",
    "\"quoted\" & 'single'",
    "naïve 猫",
    "two\nlines",
    "</td></table></svg>",
    "`code`, \\ and *stars*",
    "=1+1",
]


def class_row(name, seen=None, is_thing=None, **scores) -> dict:
    return {"name": name, "seen": seen, "is_thing": is_thing, **scores}


def semantic(miou=0.5, names=("wall", "cat"), num_images=4, **more) -> dict:
    classes = [class_row(name, index % 2 == 0, iou=miou, acc=miou) for index, name in enumerate(names)]
    scores = {"miou": miou, "fwiou": 0.25, "macc": 0.125, "pacc": 0.75}
    return {"num_images": num_images, "num_classes_counted": len(names), "classes": classes, **scores, **more}


def noise(seed: int, size=(60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def example(image_id="a.jpg", group="best", score=0.5, size=(60, 40), names=("wall", "cat")) -> ExampleImage:
    labels = np.zeros(size[::-1], int)
    labels[:, size[0] // 2 :] = 1
    return example_image(image_id, group, score, noise(0, size), labels, labels, names, 255)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# Files


def test_all_files_are_written_and_nothing_else(tmp_path):
    matrix = np.array([[3, 1], [0, 2]])
    examples = [example("x", "worst", 0.1), example("y", "best", 0.9), example("z", "best", 0.8)]
    paths = write_results(tmp_path, "m", {"scenes": semantic()}, {"scenes": matrix}, {"scenes": examples})
    assert paths == (tmp_path / "results.json", tmp_path / "results.md")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        *("report.html", "results.json", "results.md", "scenes/best_1.jpg"),
        *(
            "scenes/best_2.jpg",
            "scenes/confusion.npz",
            "scenes/confusion.png",
            "scenes/per_class.csv",
            "scenes/worst_1.jpg",
        ),
    ]
    assert np.load(tmp_path / "scenes" / "confusion.npz")["confusion"].tolist() == matrix.tolist()
    markdown = paths[1].read_text()
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown):
        Image.open(tmp_path / name).load()
    assert "best 1: y, mean IoU 90.00" in markdown
    assert "worst 1: x, mean IoU 10.00" in markdown


def test_files_that_cannot_be_written_are_one_line_and_none_is_left(tmp_path):
    (tmp_path / "scenes").write_text("in the way")
    with pytest.raises(ITAError, match="cannot write"):
        write_results(tmp_path, "m", {"scenes": semantic()})
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_the_json_holds_plain_values_and_null_for_what_was_not_measured(tmp_path):
    scores = semantic(
        np.float32(0.5),
        miou_unseen=NAN,
        num_seen_counted=np.int64(3),
        settings={"tta": np.bool_(True), "size": (800, 1333), "device": np.dtype("f4"), "worst": math.inf},
    )
    path = write_results(tmp_path, "m\udc80", {"scenes": scores})[0]
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    found = document["benchmarks"]["scenes"]
    assert document["model"] == "m\udc80"
    assert (found["miou"], found["miou_unseen"], found["num_seen_counted"]) == (0.5, None, 3)
    assert found["settings"] == {"tta": True, "size": [800, 1333], "device": "float32", "worst": None}
    assert document["versions"].keys() >= {"python", "torch", "transformers", "numpy"}


def test_the_csv_of_classes_reads_back_whatever_their_names(tmp_path):
    classes = [class_row(name, True, None, iou=0.25, pq=NAN) for name in NASTY]
    classes.append(class_row("last", False, True, iou=1 / 3, pq=0.0))
    write_results(tmp_path, "m", {"scenes": semantic() | {"classes": classes}})
    with (tmp_path / "scenes" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*NASTY, "last"]
    assert rows[0] == {
        **{"index": "0", "name": NASTY[0], "seen": "True", "is_thing": "", "iou": "0.25", "pq": ""},
    }
    assert float(rows[-1]["iou"]) == 1 / 3
    assert (rows[-1]["index"], rows[-1]["seen"], rows[-1]["pq"]) == (str(len(NASTY)), "False", "0.0")


def test_benchmarks_named_like_paths_get_folders_of_their_own():
    names = ["a/b", "a_b", "../../etc", "", "Scenes", "scenes", "猫"]
    folders = folder_names(names)
    assert folders["a/b"] == "a_b"
    assert folders["../../etc"] == "etc"
    assert len({folder.lower() for folder in folders.values()}) == len(names)
    assert all(re.fullmatch(r"[\w-][\w.-]*", folder, re.ASCII) for folder in folders.values())


# Tables


def test_a_task_has_a_table_only_where_it_was_scored_and_a_column_only_where_it_has_a_number():
    only_semantic = semantic(0.5, miou_seen=0.625, miou_unseen=NAN)
    both = semantic(0.25, miou_seen=0.75, miou_unseen=NAN, pq=0.5, sq=0.75, rq=NAN, ap=NAN)
    both["classes"] = [
        row | {"pq": pq, "ap": NAN} for row, pq in zip(both["classes"], (0.5, NAN), strict=True)
    ]
    semantic_table, panoptic, instance = summary_table({"one": only_semantic, "two": both}).split("\n\n")
    assert semantic_table.splitlines() == [
        "| benchmark | images | classes counted | mIoU | mIoU seen | fwIoU | mAcc | pAcc |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| one | 4 | 2 of 2 | 50.00 | 62.50 | 25.00 | 12.50 | 75.00 |",
        "| two | 4 | 2 of 2 | 25.00 | 75.00 | 25.00 | 12.50 | 75.00 |",
    ]
    assert panoptic.splitlines()[2:] == ["| two | 4 | 1 of 2 | 50.00 | 75.00 |"]
    assert cells(panoptic.splitlines()[0])[3:] == ["PQ", "SQ"]
    assert instance.splitlines()[2:] == ["| two | 4 | 0 of 2 | - |"]


def test_classes_are_listed_best_first_with_their_flags_and_the_uncounted_are_told(tmp_path):
    classes = [
        class_row("low", True, False, iou=0.1, acc=0.2, pq=0.3),
        class_row("high", False, True, iou=0.9, acc=NAN, pq=NAN),
        class_row("absent", True, True, iou=NAN, acc=NAN, pq=NAN),
    ]
    text = write_results(tmp_path, "m", {"scenes": semantic() | {"classes": classes}})[1].read_text()
    table = text[text.index("| class |") :].splitlines()
    assert cells(table[0]) == ["class", "IoU", "accuracy", "PQ", "masks in training", "kind"]
    assert cells(table[2]) == ["high", "90.00", "-", "-", "unseen", "thing"]
    assert cells(table[3]) == ["low", "10.00", "20.00", "30.00", "seen", "stuff"]
    assert "without scores: 1." in text
    assert "absent" not in text


def test_names_with_markup_stay_one_cell_of_the_markdown_table(tmp_path):
    text = write_results(tmp_path, "`m`\n#", {"a|b": semantic(names=NASTY)})[1].read_text()
    assert "<script" not in text
    assert text.startswith("# Results of `'m' #`\n")
    start = text.index("| class |")
    rows = text[start : text.index("\n\n", start)].splitlines()
    assert len(rows) == 2 + len(NASTY)
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {len(re.split(r"(?<!\\)\|", rows[0]))}


# Published scores


def test_published_scores_are_those_of_the_papers_and_marked_as_not_measured():
    table = published_table({"ade20k-150": semantic(0.125, pq=0.0625, ap=NAN), "scenes": semantic()})
    assert table.columns[:3] == ["benchmark", "score", "measured here"]
    assert all(title.startswith("published: ") for title in table.columns[3:])
    assert table.columns[3] == "published: FC-CLIP, ConvNeXt-L, arXiv 2308.02487"
    assert table.rows[0] == [
        *("ade20k-150", "mIoU", 0.125),
        *("34.1", "35.2", "36.1", "37.9", "38.2", "41.8", "41.5"),
    ]
    assert table.rows[1] == ["ade20k-150", "PQ", 0.0625, "26.8", "-", "27.1", "-", "28.1", "-", "-"]
    assert math.isnan(table.rows[2][2])
    assert table.rows[2][3:] == ["16.8", "-", "-", "-", "-", "-", "-"]
    assert len(table.rows) == 3


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        ("ade20k-847", ["14.8", "13.9", "15.1", "16.0", "16.8", "18.1", "18.3"]),
        ("pascal-context-459", ["18.2", "22.6", "21.6", "23.8", "23.9", "27.0", "26.7"]),
        ("pascal-context-59", ["58.4", "60.6", "59.4", "63.3", "62.5", "65.6", "64.7"]),
        ("pascal-voc-20", ["95.4", "96.1", "96.5", "97.0", "96.8", "98.3", "98.4"]),
        ("pascal-voc-21", ["81.8"]),
    ],
)
def test_each_benchmark_has_its_own_published_scores(benchmark, expected):
    assert published_table({benchmark: semantic()}).rows == [[benchmark, "mIoU", 0.5, *expected]]


def test_nothing_is_published_for_benchmarks_of_our_own_and_no_row_is_made_for_tasks_not_scored(tmp_path):
    assert published_table({"scenes": semantic(), "cityscapes": semantic()}) is None
    only_panoptic = {"num_images": 1, "pq": 0.5, "classes": [class_row("wall", pq=0.5)]}
    assert [row[1] for row in published_table({"ade20k-150": only_panoptic}).rows] == ["PQ"]
    write_results(tmp_path, "m", {"scenes": semantic()})
    for name in ("results.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert not any(system.name in text for system in PUBLISHED)


def test_what_others_published_is_never_where_a_measured_score_stands(tmp_path):
    results = {"ade20k-150": semantic(NAN, num_images=2000)}
    write_results(tmp_path, "m", results)
    markdown = (tmp_path / "results.md").read_text()
    assert "published by the authors, not measured here" in markdown
    row = cells(next(line for line in markdown.splitlines() if "34.1" in line))
    assert row[:4] == ["ade20k-150", "mIoU", "-", "34.1"]
    page = Page((tmp_path / "report.html").read_text())
    assert "published by the authors, not measured here" in page.text
    table = next(table for table in page.tables if "measured here" in table[0])
    measured = table[0].index("measured here")
    assert [row[measured] for row in table[1:]] == ["-"]
    summary = page.tables[0]
    assert "34.1" not in str(summary)
    for name in ("results.json", "ade20k-150/per_class.csv"):
        assert not any(system.name in (tmp_path / name).read_text() for system in PUBLISHED)


def test_a_part_of_a_validation_set_is_said_to_compare_with_nothing():
    note = comparison_note(
        {"ade20k-150": semantic(num_images=60), "pascal-voc-20": semantic(num_images=1449)}
    )
    assert "ade20k-150 (60 images, not 2,000)" in note
    assert "pascal-voc-20" not in note
    assert comparison_note({"scenes": semantic(), "ade20k-847": semantic(num_images=2000)}) == ""


# Confusions


def test_the_worst_confusions_are_read_off_the_rows():
    matrix = np.array([[80, 20, 0], [1, 8, 1], [0, 30, 970]])
    by_share = worst_confusions(matrix, 2, "share")
    assert [(c.reference, c.prediction, c.pixels, c.share) for c in by_share] == [
        (0, 1, 20, 0.2),
        (1, 0, 1, 0.1),
    ]
    by_pixels = worst_confusions(matrix, 10, "pixels")
    assert [(c.reference, c.prediction, c.pixels) for c in by_pixels] == [
        *((2, 1, 30), (0, 1, 20), (1, 0, 1), (1, 2, 1)),
    ]
    assert by_share[0].text(["wall", "building", "sky"]) == "wall -> building: 20.0 % of wall's pixels"
    with pytest.raises(ValueError, match="'iou'"):
        worst_confusions(matrix, 1, "iou")


def test_a_class_of_a_few_pixels_is_not_called_confused():
    matrix = np.diag([100_000, 100_000, 0])
    matrix[2, 0], matrix[0, 1] = 3, 500
    assert [c.reference for c in worst_confusions(matrix, 9, "share")] == [0]
    assert [c.reference for c in worst_confusions(matrix, 9, "pixels")] == [0, 2]


def test_the_image_shows_shares_of_rows_not_pixels():
    names = ["wall", "building"]
    few = confusion_image(np.array([[90, 10], [0, 5]]), names)
    many = confusion_image(np.array([[900, 100], [0, 50]]), names)
    assert few.tobytes() == many.tobytes()
    transposed = confusion_image(np.array([[90, 0], [10, 5]]), names)
    assert transposed.tobytes() != few.tobytes()
    perfect = np.asarray(confusion_image(np.array([[7, 0], [0, 2]]), names))
    colors = {tuple(color) for color in perfect.reshape(-1, 3)}
    assert (31, 97, 168) in colors  # a whole row on the diagonal
    assert (196, 62, 28) not in colors  # a whole row beside it


def test_847_classes_give_an_image_of_the_most_confused_that_can_be_read():
    matrix = np.diag(np.full(847, 1000))
    pairs = [(800, 3), (17, 400), (5, 6)]
    for rank, (one, other) in enumerate(pairs):
        matrix[one, other] = 900 - 100 * rank
    assert classes_to_draw(matrix) == [800, 3, 17, 400, 5, 6]
    matrix += 1
    assert classes_to_draw(matrix)[:6] == [800, 3, 17, 400, 5, 6]
    assert len(classes_to_draw(matrix)) <= 40
    image = confusion_image(matrix, [f"a class with quite a long name {index}" for index in range(847)])
    assert 1200 < image.width < 1700
    assert 1200 < image.height < 1700


def test_classes_without_pixels_are_left_out_and_a_perfect_847_still_gives_an_image():
    matrix = np.diag([5, 0, 5])
    assert classes_to_draw(matrix) == [0, 2]
    matrix[0, 1] = 1
    assert classes_to_draw(matrix) == [0, 1, 2]
    assert classes_to_draw(np.eye(847, dtype=int)) == list(range(40))
    with pytest.raises(ValueError, match="2 names for .* 3 classes"):
        confusion_image(matrix, ["a", "b"])
    with pytest.raises(ValueError, match=r"\(K, K\)"):
        confusion_image(np.zeros((2, 3)), ["a", "b"])


def test_an_empty_confusion_matrix_is_no_image(tmp_path):
    write_results(tmp_path, "m", {"scenes": semantic(NAN)}, {"scenes": np.zeros((2, 2), int)})
    assert not (tmp_path / "scenes" / "confusion.png").exists()
    assert "taken for what" not in (tmp_path / "report.html").read_text()


# Example images


def test_an_example_has_one_legend_for_both_overlays_with_the_iou_of_each_class():
    reference = np.array([[7, 7, 7, 3], [7, 7, 7, 255]]).repeat(20, 0).repeat(20, 1)
    prediction = np.array([[7, 7, 5, 7], [7, 7, 7, 9]]).repeat(20, 0).repeat(20, 1)
    names = [f"class {index}" for index in range(10)]
    made = example_image("id", "worst", 0.2, noise(1, (80, 40)), reference, prediction, names, 255)
    assert made.legend == [
        (0, "class 7", pytest.approx(5 / 7)),
        (1, "class 3: missed", None),
        (2, "class 5: not there", None),
    ]
    ignored, missed = np.asarray(made.reference)[30, 70], np.asarray(made.reference)[10, 70]
    grey = np.asarray(made.image.convert("L"))
    assert (ignored == grey[30, 70]).all()
    assert np.abs(missed - (0.55 * np.array(color_of(1)) + 0.45 * grey[10, 70])).max() < 3


def test_examples_are_kept_small_and_stand_side_by_side_over_their_legend():
    labels = np.zeros((1000, 2000), np.uint8)
    made = example_image("id", "best", 1.0, noise(0, (2000, 1000)), labels, labels, ["wall"], 255)
    assert made.image.size == made.reference.size == made.prediction.size == (480, 240)
    montage = side_by_side(made)
    assert montage.width == 3 * 480 + 2 * 8
    assert montage.height > 240 + 30
    with pytest.raises(ValueError, match="reference is"):
        example_image("id", "best", 1.0, noise(0), labels, labels[1:], ["wall"], 255)
    with pytest.raises(ValueError, match="'middle'"):
        example_image("id", "middle", 1.0, noise(0, (2000, 1000)), labels, labels, ["wall"], 255)


# The page

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page read strictly: each tag closed in turn; its text, tables (rows of cells) and addresses."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.names: list[str] = []
        self.scripts = 0
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "action", "xlink:href"):
                self.addresses.append(value)
            if name == "data-name":
                self.names.append(value)
            if tag == "img" and name == "alt":
                self.images.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def nasty_page(tmp_path) -> tuple[Page, str]:
    scores = semantic(0.5, names=NASTY, settings={"templates": NASTY, "<b>": None})
    scores["classes"][0]["iou"] = NAN
    scores |= {"pq": 0.25, "miou_seen": 1 / 3}
    for entry in scores["classes"]:
        entry["pq"] = 0.125
    matrix = np.arange(len(NASTY) ** 2).reshape(len(NASTY), -1)
    examples = [example(NASTY[0], "best", 0.9, names=NASTY), example('"><img src=x>\udc80', "worst", 0.1)]
    name = NASTY[5]
    write_results(tmp_path, NASTY[0] + "\udc80", {name: scores}, {name: matrix}, {name: examples})
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(content), content


def test_the_page_is_whole_and_asks_for_nothing_from_anywhere(tmp_path):
    page, content = nasty_page(tmp_path)
    assert page.addresses
    for address in page.addresses:
        assert address.startswith(("data:", "#"))
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'"data:image/[^"]*"', "", content))
    assert "@import" not in content
    assert "url(" not in content
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content).group(1)
    assert policy.startswith("default-src &#x27;none&#x27;")
    for encoded in re.findall(r'src="data:image/\w+;base64,([^"]*)"', content):
        Image.open(io.BytesIO(base64.b64decode(encoded))).load()


def test_the_page_escapes_every_name(tmp_path):
    page, content = nasty_page(tmp_path)
    assert page.scripts == 1
    assert content.count("<script>") == 1
    assert content.count("</svg>") == 1
    assert len(page.images) == 7  # one confusion image, two examples of three
    assert NASTY[0] in page.text
    shown = {" ".join(name.split()) for name in NASTY}
    assert {name.rpartition(":")[0] for name in page.names} == shown - {NASTY[0]}


def test_the_table_of_the_page_has_all_classes_and_the_scores_of_the_json(tmp_path):
    page, _ = nasty_page(tmp_path)
    scores = json.loads((tmp_path / "results.json").read_text())["benchmarks"][NASTY[5]]
    table = next(table for table in page.tables if table[0][:2] == ["#", "class"])
    assert table[0] == ["#", "class", "IoU", "accuracy", "PQ", "masks in training"]
    assert table[1:] == [
        [
            *(str(index), " ".join(entry["name"].split())),
            *("-" if entry[key] is None else f"{100 * entry[key]:.2f}" for key in ("iou", "acc", "pq")),
            "seen" if entry["seen"] else "unseen",
        ]
        for index, entry in enumerate(scores["classes"])
    ]
    summary = dict(zip(*page.tables[0], strict=True))
    assert summary["mIoU"] == f"{100 * scores['miou']:.2f}"
    assert summary["mIoU seen"] == f"{100 * scores['miou_seen']:.2f}"
    assert dict(zip(*page.tables[1], strict=True))["PQ"] == f"{100 * scores['pq']:.2f}"


def test_many_large_examples_leave_the_page_small(tmp_path):
    many = [
        ExampleImage(f"{index}", group, 0.5, *[noise(index, (480, 480))] * 3)
        for group in ("best", "worst")
        for index in range(12)
    ]
    write_results(tmp_path, "m", {"scenes": semantic()}, {}, {"scenes": many})
    assert len(list((tmp_path / "scenes").glob("*.jpg"))) == 24
    size = (tmp_path / "report.html").stat().st_size
    assert size < 4 / 3 * html_report.EXAMPLE_BYTES + 100_000
    assert (tmp_path / "report.html").read_text().count("<figure>") >= 4


def test_results_of_no_benchmark_and_of_no_score_are_reported(tmp_path):
    write_results(tmp_path / "none", "m", {})
    nothing = {"num_images": 0, "classes": [class_row("wall")], "miou": NAN}
    write_results(tmp_path / "nothing", "m", {"scenes": nothing})
    for name in ("none", "nothing"):
        Page((tmp_path / name / "report.html").read_text())
    assert "| scenes | 0 | 0 of 1 | - |" in (tmp_path / "nothing" / "results.md").read_text()


BROWSER = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page's script is not tried")
def test_in_a_browser_a_click_sorts_the_classes_with_the_unmeasured_last(tmp_path):
    scores = semantic(names=["b", "c", "a", "d"])
    for entry, iou in zip(scores["classes"], (0.5, NAN, 0.09, 0.75), strict=True):
        entry["iou"] = iou
    write_results(tmp_path, "m", {"scenes": scores})
    content = (tmp_path / "report.html").read_text()
    clicks = """<script>
    const rows = () => [...document.querySelectorAll("table.sortable tbody tr")];
    const order = () => rows().map((row) => row.cells[1].textContent).join("");
    const click = (column) => document.querySelectorAll("table.sortable th button")[column].click();
    const orders = [];
    for (const column of [2, 2, 1, 1, 0]) { click(column); orders.push(order()); }
    const field = document.querySelector("input");
    field.value = "D"; field.dispatchEvent(new Event("input"));
    orders.push(rows().filter((row) => !row.hidden).map((row) => row.cells[1].textContent).join(""));
    const wide = document.documentElement.scrollWidth > innerWidth;
    document.body.innerHTML = "<pre>" + orders.join(" ") + (wide ? " too wide" : "") + "</pre>";
    </script></body>"""
    (tmp_path / "clicked.html").write_text(content.replace("</body>", clicks))
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom"),
        (tmp_path / "clicked.html").as_uri(),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium gave no answer in 100 seconds: the page's script is not tried")
    assert re.search("<pre>(.*)</pre>", done.stdout).group(1) == "dbac abdc abcd dcba bcad d"
