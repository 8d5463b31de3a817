"""The `ita` command and what all commands share: versions, help, exit statuses, one line for what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ita_segmentation import __version__
from ita_segmentation.cli.main import COMMANDS, main
from ita_segmentation.cli.parser import ConfigArgumentParser, run_command
from ita_segmentation.errors import ITAError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ita(monkeypatch, capsys):
    """Runs `ita ARGUMENTS`; gives its status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["/usr/bin/ita", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        printed = capsys.readouterr()
        return int(exit_info.value.code or 0), printed.out, printed.err

    return run


def test_version_help_and_a_command_that_does_not_exist(ita):
    assert ita("--version") == (0, f"ita {__version__}\n", "")
    for arguments in ((), ("--help",), ("help",)):
        status, out, err = ita(*arguments)
        assert (status, err) == (0, "")
        assert all(f"  {name} " in out for name in COMMANDS)
    status, out, err = ita("segment")
    assert (status, out) == (2, "")
    assert err.startswith("ita: error: no such command: 'segment' (one of predict, ")
    assert err.count("\n") == 1


def test_wrong_usage_is_one_line_with_the_name_of_the_command(ita):
    status, _, err = ita("predict", "--images", "a.png")
    assert status == 2
    assert err == (
        "ita predict: error: the following arguments are required: --model, --output (see --help)\n"
    )


@pytest.mark.parametrize("command", ["predict", "app"])
def test_help_is_short_grouped_and_imports_no_torch(command):
    script = f"import sys; sys.argv = ['ita', '{command}', '--help']\n"
    script += "from ita_segmentation.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'gradio', 'numpy'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    first = {"predict": "input and output:", "app": "what is served:"}[command]
    assert done.stdout.index(first) < 400
    assert len(done.stdout.splitlines()) <= 66


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ITAError("no such\nfile"), 1, "ita test: error: no such file"),
        (UsageError("wrong"), 2, "ita test: error: wrong"),
        (KeyboardInterrupt(), 130, "ita test: interrupted"),
        (
            ModuleNotFoundError("No module named 'datasets'", name="datasets"),
            1,
            "ita test: error: this needs the package datasets: pip install 'ita-segmentation[eval]'",
        ),
        (
            ModuleNotFoundError("No module named 'gradio.x'", name="gradio.x"),
            1,
            "ita test: error: this needs the package gradio: pip install 'ita-segmentation[app]'",
        ),
    ],
)
def test_each_kind_of_failure_has_its_exit_status_and_one_line(error, status, line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ita test"])

    def fail(argv):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run_command(fail)
    assert exit_info.value.code == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_mistake_of_ours_is_not_taken_for_the_users():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0)
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda argv: __import__("no_such_module_of_ours"))


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("train", "accelerate", "train"), ("eval", "accelerate", "eval"), ("train", "jinja2", "eval")],
)
def test_a_command_names_its_own_extra_if_that_has_the_package(command, package, extra, monkeypatch, capsys):
    def fail(argv):
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr("sys.argv", [f"ita {command}"])
    with pytest.raises(SystemExit):
        run_command(fail)
    assert f"pip install 'ita-segmentation[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("datasets", ["predict", "--dataset", "{data}", "--output", "{out}"], "eval"),
        (
            "pycocotools",
            ["predict", "--images", "{image}", "--format", "coco", "--output", "{out}"],
            "integrations",
        ),
        ("gradio", ["app"], "app"),
    ],
)
def test_a_missing_extra_is_named(module, arguments, extra, ita, monkeypatch, tmp_path):
    from PIL import Image

    from helpers.tiny_checkpoint import save_tiny_checkpoint

    for name in [name for name in sys.modules if name.partition(".")[0] == module or ".app." in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").touch()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    places = {"data": tmp_path / "data", "out": tmp_path / "out", "image": tmp_path / "a.png"}
    command, *rest = (one.format(**places) for one in arguments)
    model = save_tiny_checkpoint(tmp_path / "model")
    status, _, err = ita(command, "--model", model, *rest)
    assert status == 1
    assert err.splitlines()[-1].endswith(
        f"this needs the package {module}: pip install 'ita-segmentation[{extra}]'"
    )


def test_arguments_of_a_config_file_are_checked_like_the_command_lines(tmp_path):
    parser = ConfigArgumentParser(prog="test")
    parser.add_argument("--size", type=int)
    parser.add_argument("--names", nargs="+")
    config = tmp_path / "arguments.yaml"
    config.write_text("size: 3\nnames: [a, b]\n")
    assert vars(parser.parse_command_line(["--config", str(config), "--size", "4"])) == {
        "config": config,
        "size": 4,
        "names": ["a", "b"],
    }
    config.write_text("colour: red\n")
    with pytest.raises(UsageError, match="unknown argument 'colour'"):
        parser.parse_command_line(["--config", str(config)])
