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
from ita_segmentation.evaluation import write_results
from ita_segmentation.evaluation.reporting.examples import example_image, side_by_side
from ita_segmentation.evaluation.reporting.figures import (
    class_figure,
    classes_to_draw,
    confusion_figure,
    worst_confusions,
)
from ita_segmentation.evaluation.reporting.report import folder_names, summary_table
from ita_segmentation.evaluation.reporting.score_tables import (
    comparison_note,
    published_systems,
    published_table,
)
from ita_segmentation.visualization import color_of

NAN = math.nan
NASTY = [
    "<script>alert(1)</script>",
    "a|b",
    "\"quoted\" & 'single' $x_1$",
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
    scores = {"miou": miou, "miou_with_predicted": 0.4, "fwiou": 0.25, "macc": 0.125, "pacc": 0.75}
    return {"num_images": num_images, "num_classes_counted": len(names), "classes": classes, **scores, **more}


def noise(seed: int, size=(60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def example(image_id="a.jpg", group="best", score=0.5, size=(60, 40), names=("wall", "cat")):
    labels = np.zeros(size[::-1], int)
    labels[:, size[0] // 2 :] = 1
    return example_image(image_id, group, score, noise(0, size), labels, labels, names, 255)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_all_files_are_written_and_nothing_else(tmp_path):
    matrix = np.array([[3, 1], [0, 2]])
    examples = [example("x", "worst", 0.1), example("y", "best", 0.9), example("z", "best", 0.8)]
    paths = write_results(tmp_path, "m", {"scenes": semantic()}, {"scenes": matrix}, {"scenes": examples})
    assert paths == (tmp_path / "results.json", tmp_path / "results.md")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "report.html",
        "results.json",
        "results.md",
        "scenes/best_1.jpg",
        "scenes/best_2.jpg",
        "scenes/confusion.npz",
        "scenes/confusion.png",
        "scenes/per_class.csv",
        "scenes/worst_1.jpg",
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
    first = {"index": "0", "name": NASTY[0], "seen": "True", "is_thing": "", "iou": "0.25", "pq": ""}
    assert rows[0] == first
    assert float(rows[-1]["iou"]) == 1 / 3
    assert (rows[-1]["index"], rows[-1]["seen"], rows[-1]["pq"]) == (str(len(NASTY)), "False", "0.0")


def test_benchmarks_named_like_paths_get_folders_of_their_own():
    names = ["a/b", "a_b", "../../etc", "", "Scenes", "scenes", "猫"]
    folders = folder_names(names)
    assert (folders["a/b"], folders["../../etc"]) == ("a_b", "etc")
    assert len({folder.lower() for folder in folders.values()}) == len(names)
    assert all(re.fullmatch(r"[\w-][\w.-]*", folder, re.ASCII) for folder in folders.values())


# Tables


def test_a_task_has_a_table_only_where_it_was_scored_and_a_column_only_where_it_has_a_number():
    only_semantic = semantic(0.5, miou_seen=0.625, miou_unseen=NAN)
    both = semantic(0.25, miou_seen=0.75, miou_unseen=NAN, pq=0.5, sq=0.75, rq=NAN, ap=NAN)
    both |= {"panoptic_num_classes_counted": 1, "instance_num_classes_counted": 0}
    semantic_table, panoptic, instance = summary_table({"one": only_semantic, "two": both}).split("\n\n")
    assert semantic_table.splitlines() == [
        "| benchmark | images | classes counted | mIoU | mIoU seen | mIoU with predicted | fwIoU | mAcc | pAcc |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| one | 4 | 2 of 2 | 50.00 | 62.50 | 40.00 | 25.00 | 12.50 | 75.00 |",
        "| two | 4 | 2 of 2 | 25.00 | 75.00 | 40.00 | 25.00 | 12.50 | 75.00 |",
    ]
    assert panoptic.splitlines()[2:] == ["| two | 4 | 1 of 2 | 50.00 | 75.00 |"]
    assert cells(panoptic.splitlines()[0])[3:] == ["PQ", "SQ"]
    assert instance.splitlines()[2:] == ["| two | 4 | 0 of 2 | - |"]


def test_classes_are_listed_best_first_with_their_flags_and_those_without_scores_are_counted(tmp_path):
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


def test_published_scores_stand_beside_ours_and_are_marked_as_not_measured(tmp_path):
    results = {"ade20k-150": semantic(NAN, pq=0.0625, ap=NAN, num_images=2000), "scenes": semantic()}
    table = published_table(results)
    assert table.columns[:4] == [
        "benchmark",
        "score",
        "measured here",
        "published: FC-CLIP, ConvNeXt-L, arXiv 2308.02487",
    ]
    assert [row[:2] for row in table.rows] == [["ade20k-150", score] for score in ("mIoU", "PQ", "AP")]
    assert [row[3] for row in table.rows] == ["34.1", "26.8", "16.8"]
    assert "-" in table.rows[1]
    write_results(tmp_path, "m", results)
    markdown = (tmp_path / "results.md").read_text()
    page = Page((tmp_path / "report.html").read_text())
    for text in (markdown, page.text):
        assert "published by the authors, not measured here" in text
        assert "mIoU is the mean over the classes with ground truth" in text
    assert cells(next(line for line in markdown.splitlines() if "34.1" in line))[:4] == [
        "ade20k-150",
        "mIoU",
        "-",
        "34.1",
    ]
    shown = next(table for table in page.tables if "measured here" in table[0])
    assert [row[2] for row in shown[1:]] == ["-", "6.25", "-"]
    for name in ("results.json", "ade20k-150/per_class.csv"):
        assert not any(system.name in (tmp_path / name).read_text() for system in published_systems())


def test_fc_clips_scores_are_those_of_its_paper():
    [system] = [system for system in published_systems() if system.name == "FC-CLIP"]
    assert {name: scores["miou"] for name, scores in system.scores.items()} == {
        "ade20k-847": 14.8,
        "pascal-context-459": 18.2,
        "ade20k-150": 34.1,
        "pascal-context-59": 58.4,
        "pascal-voc-20": 95.4,
        "pascal-voc-21": 81.8,
    }


def test_no_row_is_made_where_nothing_is_published_or_scored_and_a_partial_set_is_named():
    assert published_table({"scenes": semantic(), "cityscapes": semantic()}) is None
    only_panoptic = {"num_images": 1, "pq": 0.5, "classes": [class_row("wall", pq=0.5)]}
    assert [row[1] for row in published_table({"ade20k-150": only_panoptic}).rows] == ["PQ"]
    note = comparison_note(
        {"ade20k-150": semantic(num_images=60), "pascal-voc-20": semantic(num_images=1449)}
    )
    assert "ade20k-150 (60 images, not 2,000)" in note
    assert "pascal-voc-20" not in note


# Confusions and figures


def test_the_worst_confusions_are_read_off_the_rows_and_tiny_classes_are_not_called_confused():
    matrix = np.array([[80, 20, 0], [1, 8, 1], [0, 30, 970]])
    by_share = worst_confusions(matrix, 2, "share")
    assert [(c.reference, c.prediction, c.pixels, c.share) for c in by_share] == [
        (0, 1, 20, 0.2),
        (1, 0, 1, 0.1),
    ]
    assert [c.pixels for c in worst_confusions(matrix, 10, "pixels")] == [30, 20, 1, 1]
    assert by_share[0].text(["wall", "building", "sky"]) == "wall -> building: 20.0 % of wall's pixels"
    matrix = np.diag([100_000, 100_000, 0])
    matrix[2, 0], matrix[0, 1] = 3, 500
    assert [c.reference for c in worst_confusions(matrix, 9, "share")] == [0]
    assert [c.reference for c in worst_confusions(matrix, 9, "pixels")] == [0, 2]


def test_of_847_classes_the_most_confused_are_drawn_and_the_rest_in_one_column():
    matrix = np.diag(np.full(847, 1000)) + 1
    for rank, (one, other) in enumerate([(800, 3), (17, 400), (5, 6)]):
        matrix[one, other] = 900 - 100 * rank
    assert classes_to_draw(matrix)[:6] == [800, 3, 17, 400, 5, 6]
    axes = confusion_figure(matrix, [f"class {index}" for index in range(847)]).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert (names[0], names[-1], len(names)) == ("class 800", "all others", 41)
    assert "40 most confused of 847 classes" in axes.get_title()
    assert classes_to_draw(np.diag([5, 0, 5])) == [0, 2]
    assert classes_to_draw(np.eye(847, dtype=int)) == list(range(40))


def test_figures_show_percent_of_rows_and_a_bar_for_each_class_with_a_score():
    axes = confusion_figure(np.array([[90, 10], [0, 50]]), ["wall", "building"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["90", "10", "100"]
    scores = semantic(0.5, names=["a", "b", "c"])
    scores["classes"][1]["iou"], scores["classes"][2]["iou"] = NAN, 0.9
    axes = class_figure(scores).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "a"]
    assert sorted(bar.get_height() for bar in axes.patches) == [50, 90]
    assert "mean 50.00" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert class_figure({"classes": [class_row("wall", iou=NAN)], "miou": NAN}) is None


# Example images


def test_an_example_has_one_legend_for_both_overlays_with_the_iou_of_each_class():
    reference = np.array([[7, 7, 7, 3], [7, 7, 7, 255]]).repeat(20, 0).repeat(20, 1)
    prediction = np.array([[7, 7, 5, 7], [7, 7, 7, 9]]).repeat(20, 0).repeat(20, 1)
    names = [f"class {index}" for index in range(10)]
    made = example_image("id", "worst", 0.2, noise(1, (80, 40)), reference, prediction, names, 255)
    assert made.legend == [
        (0, "class 7", pytest.approx(5 / 7)),
        (1, "class 3: missed", None),
        (2, "class 5: not in the labels", None),
    ]
    ignored, missed = np.asarray(made.reference)[30, 70], np.asarray(made.reference)[10, 70]
    gray = np.asarray(made.image.convert("L"))
    assert (ignored == gray[30, 70]).all()
    assert np.abs(missed - (0.55 * np.array(color_of(1)) + 0.45 * gray[10, 70])).max() < 3


def test_examples_are_kept_small_and_stand_side_by_side_over_their_legend():
    labels = np.zeros((1000, 2000), np.uint8)
    made = example_image("id", "best", 1.0, noise(0, (2000, 1000)), labels, labels, ["wall"], 255)
    assert made.image.size == made.reference.size == made.prediction.size == (480, 240)
    montage = side_by_side(made)
    assert montage.width == 3 * 480 + 2 * 8
    assert montage.height > 240 + 30
    with pytest.raises(ValueError, match="reference is"):
        example_image("id", "best", 1.0, noise(0), labels, labels[1:], ["wall"], 255)


# The page

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page read strictly: each tag closed in turn; its text, tables (rows of cells) and URLs."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.urls: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "action", "xlink:href"):
                self.urls.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip("\n")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> tuple[Page, str, dict]:
    """A report full of names with markup: its page, the page's source, and the scores in results.json."""
    folder = tmp_path_factory.mktemp("nasty")
    scores = semantic(0.5, names=NASTY, settings={"templates": NASTY, "<b>": None}, pq=0.25, miou_seen=1 / 3)
    scores["classes"][0]["iou"] = NAN
    for entry in scores["classes"]:
        entry["pq"] = 0.125
    matrix = np.arange(len(NASTY) ** 2).reshape(len(NASTY), -1)
    examples = [example(NASTY[0], "best", 0.9, names=NASTY), example('"><img src=x>\udc80', "worst", 0.1)]
    name = NASTY[5]
    write_results(folder, NASTY[0] + "\udc80", {name: scores}, {name: matrix}, {name: examples})
    content = (folder / "report.html").read_text(encoding="utf-8")
    written = json.loads((folder / "results.json").read_text())["benchmarks"][name]
    return Page(content), content, written


def test_the_page_is_self_contained(nasty):
    page, content, _ = nasty
    assert (
        len(re.findall(r"<img ", content)) == 8
    )  # a chart, a confusion matrix, two examples of three images
    assert all(url.startswith(("data:", "#")) for url in page.urls)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'"data:image/[^"]*"', "", content))
    assert "@import" not in content
    assert "url(" not in content
    assert "Content-Security-Policy\" content=\"default-src 'none'" in content
    for encoded in re.findall(r'src="data:image/\w+;base64,([^"]*)"', content):
        Image.open(io.BytesIO(base64.b64decode(encoded))).load()


def test_the_page_escapes_every_name_and_has_all_classes_and_scores(nasty):
    page, content, scores = nasty
    assert content.count("<script>") == 1
    assert NASTY[0] in page.text
    table = next(table for table in page.tables if table[0][:2] == ["#", "class"])
    assert table[0] == ["#", "class", "IoU", "accuracy", "PQ", "masks in training"]
    assert table[1:] == [
        [
            str(index),
            " ".join(entry["name"].split()),
            *("-" if entry[key] is None else f"{100 * entry[key]:.2f}" for key in ("iou", "acc", "pq")),
            "seen" if entry["seen"] else "unseen",
        ]
        for index, entry in enumerate(scores["classes"])
    ]
    summary = dict(zip(*page.tables[0], strict=True))
    assert summary["mIoU"] == f"{100 * scores['miou']:.2f}"
    assert summary["mIoU with predicted"] == f"{100 * scores['miou_with_predicted']:.2f}"
    assert dict(zip(*page.tables[1], strict=True))["PQ"] == f"{100 * scores['pq']:.2f}"


def test_many_large_examples_leave_the_page_small(tmp_path):
    many = [example(str(index), group, 0.5, (480, 480)) for group in ("best", "worst") for index in range(14)]
    write_results(tmp_path, "m", {"scenes": semantic()}, {}, {"scenes": many})
    assert len(list((tmp_path / "scenes").glob("*.jpg"))) == 28
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    assert (tmp_path / "report.html").read_text().count("<figure>") == 24


def test_results_of_no_benchmark_and_of_no_score_are_reported(tmp_path):
    write_results(tmp_path / "none", "m", {})
    nothing = {"num_images": 0, "classes": [class_row("wall")], "miou": NAN}
    write_results(tmp_path / "nothing", "m", {"scenes": nothing}, {"scenes": np.zeros((1, 1), int)})
    for name in ("none", "nothing"):
        Page((tmp_path / name / "report.html").read_text())
    assert "| scenes | 0 | 0 of 1 | - |" in (tmp_path / "nothing" / "results.md").read_text()
    assert not (tmp_path / "nothing" / "scenes" / "confusion.png").exists()


BROWSER = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.browser
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
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,900",
        "--dump-dom",
        (tmp_path / "clicked.html").as_uri(),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium gave no answer in 100 seconds: the page's script is not tried")
    assert re.search("<pre>(.*)</pre>", done.stdout).group(1) == "dbac abdc abcd dcba bcad d"
