"""Configuration files: bounded in size and depth, and read by the rules of the command line."""

import dataclasses
import importlib

import pytest

from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.errors import ITAError, UsageError
from ita_segmentation.files import parse_mapping, read_mapping

ALIAS_BOMB = "\n".join(
    ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
)
MERGE_BOMB = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10))]
)


@dataclasses.dataclass
class Arguments:
    flip: bool = True
    size: int = 3
    names: list[str] = dataclasses.field(default_factory=list, metadata={"aliases": "--old_names"})


def parse(*arguments: str) -> Arguments:
    parser = ConfigArgumentParser([Arguments], prog="test")
    return parser.parse_args_into_dataclasses(parser.with_config(arguments), look_for_args_file=False)[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ALIAS_BOMB, "more than 100,000 values"),
        (MERGE_BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "too deeply nested"),
        ("a: " + "[" * 80 + "]" * 80, "too deeply nested"),
        ('{"a": ' + "[" * 100_000, "too deeply nested"),
        ("a: " + "x" * 1_000_001, "more than 1,000,000 characters"),
        ("a: [1", "neither YAML nor JSON"),
        ("a: " + "1" * 5000, "neither YAML nor JSON"),
        ("a: 2024-99-99", "neither YAML nor JSON"),
        ("{[a]: 1}", "neither YAML nor JSON"),
        ("- a", "must be a mapping"),
    ],
)
def test_a_hostile_or_broken_file_is_answered_in_one_line(tmp_path, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ITAError, match=reason) as caught:
        read_mapping(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value) and str(tmp_path / "config.yaml") in str(caught.value)


def test_ordinary_anchors_and_empty_files_are_read():
    text = "base: &base {a: 1, b: [1, 2]}\nother:\n  <<: *base\n  a: 2"
    assert parse_mapping(text, "here")["other"] == {"a": 2, "b": [1, 2]}
    assert parse_mapping("# nothing", "here") == {}


def test_a_file_says_what_the_command_line_says_and_the_command_line_takes_precedence(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("flip: true\nsize: 5\nold_names: [a, b c]")
    assert parse("--config", str(file)) == Arguments(True, 5, ["a", "b c"])
    assert parse("--config", str(file), "--size", "7", "--flip", "false") == Arguments(False, 7, ["a", "b c"])
    for text, flip in (("flip: false", False), ("no_flip: true", False), ("no_flip: false", True)):
        file.write_text(text)
        assert parse("--config", str(file)).flip is flip
    file.write_text("flop: false")
    with pytest.raises(UsageError, match="unknown argument 'flop'"):
        parse("--config", str(file))


@pytest.mark.parametrize(
    ("module", "old", "value", "new"),
    [
        ("export", "--format", "web", "target"),
        ("prepare", "--classes", "names.json", "vocabulary"),
        ("eval_options", "--num_examples", "7", "num_report_images"),
        ("train", "--learn_words", "true", "tune_class_names"),
        ("train", "--learn-words", "true", "tune_class_names"),
    ],
)
@pytest.mark.parametrize("form", ["word", "assignment", "file"])
def test_an_old_option_still_works_and_names_the_new_one(module, old, value, new, form, tmp_path):
    parser = importlib.import_module(f"ita_segmentation.cli.{module}").build_parser()
    (tmp_path / "config.yaml").write_text(f"{old.removeprefix('--')}: {value}")
    words = {
        "word": [old, value],
        "assignment": [f"{old}={value}"],
        "file": ["--config", str(tmp_path / "config.yaml")],
    }[form]
    with pytest.warns(FutureWarning, match=f"{old} is deprecated: use --{new}"):
        given = parser.with_config(words)
    [action] = [one for one in parser._actions if f"--{new}" in one.option_strings]
    assert given[0].partition("=")[0] in action.option_strings
    assert value in " ".join(given).lower().replace("=", " ").split()
