"""The documentation: every code block is tried, the site builds, the notebook runs.

Blocks of Python run in order, a page at a time, in a folder that sees `models/`, `examples/` and the like. Commands are
read by the parsers of the programs that they name. `<!-- run -->` before a command runs it; `<!-- not run: why -->`
before a block says what it would take.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from helpers.docs_blocks import (
    ROOT,
    call_program,
    check_command,
    commands_of,
    program_of,
    read_blocks,
    same_output,
)

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "five_minutes.ipynb"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("models/*/README.md")), *sorted(DOCS.glob("*.md"))]
SEEN = (
    "models",
    "examples",
    "recipes",
    "benchmarks",
    "ita_segmentation",
    "tests",
    "docs",
)


@pytest.fixture
def reader_folder(tmp_path, monkeypatch):
    """An empty folder in which the repository's data is where pages say that it is."""
    for name in SEEN:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(code, namespace, name):
    """What a block prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), namespace)
    return printed.getvalue()


def try_commands(block, name):
    for words in commands_of(block.code):
        check_command(words)
        if block.marker == "run":
            program, arguments = program_of(words)
            with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
                call_program(program, arguments)
            assert not end.value.code, f"{name}: {words} ended with {end.value.code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix())
def test_every_code_block_of_a_page_works(page, reader_folder):
    namespace = {"__name__": "__main__"}
    printed = ""
    for block in read_blocks(page.read_text(encoding="utf-8")):
        name = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.language in ("python", "py"):
            if block.marker == "not run":
                compile(block.code, name, "exec")
            else:
                printed = run_python(block.code, namespace, name)
        elif block.language == "bash":
            try_commands(block, name)
        elif block.language == "json":
            for line in block.code.splitlines():
                json.loads(line)
        elif not block.language and printed:
            assert same_output(block.code, printed), f"{name} shows other output than this:\n{printed}"
            printed = ""


def test_a_block_that_is_not_run_must_say_why():
    assert read_blocks("<!-- not run: needs a GPU -->\n```bash\nmake\n```\n")[0].reason == "needs a GPU"
    for marker in ("<!-- not run -->", "<!-- not run: -->"):
        with pytest.raises(ValueError, match="must say why"):
            read_blocks(f"{marker}\n```bash\nmake\n```\n")


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("python run_eval.py --modle x --benchmarks scenes --output y", "modle"),
        ("python run_eval.py --model x --benchmarks scenes", "output"),
        (
            "accelerate launch run_train.py --config recipes/finetune_folder.yaml --no_such_thing 3",
            "no_such_thing",
        ),
        ("ita predict --model x --images y --task everything --output z", "everything"),
        ("ita segment --model x", "segment"),
        ("python run_prepare.py imagenet --source x --output y", "imagenet"),
        ("python run_nothing.py", "nothing"),
        ("make coffee", "coffee"),
        ("pip install -e '.[everything]'", "everything"),
        ("segment-it image.jpg", "segment-it"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, complaint, reader_folder):
    [words] = commands_of(command)
    with pytest.raises(ValueError, match=complaint):
        check_command(words)


def test_output_is_compared_by_words_and_numbers():
    assert same_output("mIoU 0.731\n", "mIoU  0.7312")
    assert not same_output("mIoU 0.731\n", "mIoU 0.831")
    assert not same_output("mIoU 0.731\n", "PQ 0.731")


def test_links_and_images_of_pages_exist():
    missing = []
    for page in [*PAGES, *DOCS.glob("reference/*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
            if not re.match(r"https?:", target) and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing


def test_the_files_and_names_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [layout] = re.findall(r"^## Where things live\n+```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    folder, missing = ROOT, []
    for line in layout.splitlines():
        folder = (
            ROOT / line.split("/")[0] if re.match(r"\w+/  ", line) else folder if line[0] == " " else ROOT
        )
        missing += [name for name in re.findall(r"\w+\.py", line) if not (folder / name).is_file()]
    for paragraph in text.partition("## How to")[2].partition("## Rules")[0].split("\n\n"):
        quoted = re.findall(r"`([^`]+)`", paragraph)
        files = [ROOT / name for name in quoted if "/" in name]
        missing += [str(file) for file in files if not file.exists()]
        code = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        names = [name.partition("[")[0] for name in quoted if "/" not in name and ".py" not in name]
        missing += [name for name in names if name not in code]
    assert not missing


def test_the_site_builds_without_a_warning_and_asks_no_other_host_for_anything(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    fetched = re.compile(
        r"""<(?:script|img|iframe|source|link\s+rel="(?:stylesheet|icon)")[^>]*(?:src|href)="?https?:"""
    )
    assert not [page.name for page in pages if fetched.search(page.read_text(encoding="utf-8"))]
    reference = (tmp_path / "site" / "reference" / "model.html").read_text(encoding="utf-8")
    assert "num_dominant_categories" in reference and "set_vocabulary" in reference
    assert "data:image/" in (tmp_path / "site" / "notebooks" / "five_minutes.html").read_text(
        encoding="utf-8"
    )


def test_every_page_is_in_the_navigation():
    listed = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [page.relative_to(DOCS).as_posix() for page in [*DOCS.glob("*.md"), *DOCS.glob("reference/*.md")]]
    assert [page for page in pages if page not in listed] == []


def test_the_notebook_runs_and_is_saved_with_its_outputs(reader_folder):
    for package in ("nbclient", "nbformat", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    import nbformat
    from nbclient import NotebookClient

    saved = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "the notebook was saved without being run"
    assert NOTEBOOK.stat().st_size < 600_000
    again = nbformat.from_dict(json.loads(json.dumps(saved)))
    NotebookClient(again, timeout=300, resources={"metadata": {"path": str(reader_folder)}}).execute()
    for old, new in zip(saved.cells, again.cells, strict=True):
        if old.cell_type == "code":
            assert same_output(printed_by(old), printed_by(new)), old.source


def printed_by(cell):
    return "".join(
        output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
    )
