"""The code blocks of a Markdown page, and how each is tried."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ita_segmentation.cli.main import run_by_name

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"(?:^[ ]*<!--[ ]*(?P<marker>not run|run)(?P<reason>:?[^>]*?)-->[ ]*\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
OTHER_COMMANDS = {"source", "cd", "git", "hf", "mkdir", "cp"}
COMMAND = "ita"


@dataclass(frozen=True)
class Block:
    """A fenced block: `marker` is "run", "not run" or "", `line` the line of its fence in the page."""

    language: str
    code: str
    line: int
    marker: str
    reason: str


def read_blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: a marker `<!-- not run -->` that does not say why.
    """
    blocks = []
    for found in FENCE.finditer(markdown):
        line = markdown.count("\n", 0, found.start("language")) + 1
        reason = found["reason"].lstrip(":").strip() if found["marker"] else ""
        if found["marker"] == "not run" and len(reason.split()) < 2:
            raise ValueError(f"line {line}: '<!-- not run: ... -->' must say why")
        indent = len(found["indent"])
        code = "".join(
            row[indent:] if row.strip() else "\n" for row in found["code"].splitlines(keepends=True)
        )
        blocks.append(Block(found["language"], code, line, found["marker"] or "", reason))
    return blocks


def same_output(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed: the same words, and numbers within one in a hundred."""
    if NUMBER.sub("#", " ".join(shown.split())) != NUMBER.sub("#", " ".join(printed.split())):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= 0.011 * max(1.0, abs(float(one))) for one, other in pairs)


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block, as words: comments, variables before a command and `&&` are taken away.

    Raises:
        ValueError: quotes that do not match.
    """
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
                continue
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command.pop(0)
            if command:
                commands.append(command)
            command = []
    return commands


def program_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The program of this repository that a command runs, with its arguments: `("eval", ["--model", ...])`.

    A command of `ita` and its script `run_COMMAND.py` are the command's name, another script is its path without ".py".
    """
    if words[0] == COMMAND:
        return (words[1].replace("-", "_"), list(words[2:])) if len(words) > 1 else None
    if words[0] not in ("python", "accelerate", "torchrun", "ray"):
        return None
    for place, word in enumerate(words[1:], 1):
        if word.endswith(".py"):
            name = word.removesuffix(".py")
            return (name.removeprefix("run_") if "/" not in name else name), list(words[place + 1 :])
    return None


def check_command(words: Sequence[str]) -> None:
    """Fails where a command names what does not exist: an option, a target of `make`, a file, an extra of `pip`.

    Raises:
        ValueError: what is wrong with it.
    """
    program = program_of(words)
    if program is not None:
        parse_arguments(*program)
        return
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
    elif words[0] == "pip" or list(words[:3]) == ["python", "-m", "pip"]:
        named = {
            extra for word in words for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))
        }
        unknown = sorted(named - set(extras()))
    elif list(words[:3]) == ["python", "-m", "pytest"]:
        unknown = [word for word in words[3:] if word.endswith(".py") and not (ROOT / word).exists()]
    elif list(words[:2]) == ["python", "-m"] and words[2].split(".")[0] in (
        "modeling_ita",
        "ita_segmentation",
    ):
        unknown = [] if (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file() else [words[2]]
    elif words[0] == "mkdocs" or list(words[:3]) == ["python", "-m", "venv"]:
        unknown = []
    else:
        unknown = [] if words[0] in OTHER_COMMANDS else [words[0]]
    if unknown:
        raise ValueError(f"{shlex.join(words)}: no such thing as {', '.join(unknown)}")


class _Parsed(BaseException):
    """The arguments of a program were read to the end."""


def parse_arguments(program: str, arguments: Sequence[str]) -> None:
    """Has a program's own parser read its arguments, and nothing more.

    Raises:
        ValueError: what the parser says of them, or there is no such program.
    """
    script = "/" in program
    if not (ROOT / (f"{program}.py" if script else f"ita_segmentation/cli/{program}.py")).is_file():
        raise ValueError(f"no program {program}")
    if list(arguments) == ["--help"]:
        return
    original = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser: Any, *given: Any, **options: Any) -> Any:
        result = original(parser, *given, **options)
        if not result[1] and len(parser._actions) > 2:
            raise _Parsed
        return result

    errors = io.StringIO()
    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_and_stop),
            contextlib.redirect_stderr(errors),
        ):
            call_program(program, arguments)
    except _Parsed:
        return
    except SystemExit as stopped:
        raise ValueError(f"{program} {shlex.join(arguments)}: {errors.getvalue().strip()}") from stopped
    raise ValueError(f"{program} {shlex.join(arguments)}: its arguments were not parsed")


def call_program(program: str, arguments: Sequence[str]) -> None:
    """Runs a program of the repository in this process.

    Raises:
        SystemExit: as it ends itself.
    """
    if "/" in program:
        path = str(ROOT / f"{program}.py")
        with (
            mock.patch("sys.argv", [path, *arguments]),
            mock.patch("sys.path", [str(Path(path).parent), *sys.path]),
        ):
            runpy.run_path(path, run_name="__main__")
    else:
        with mock.patch("sys.argv", [f"ita {program}", *arguments]):
            run_by_name(program.replace("_", "-"))


def extras() -> list[str]:
    """The extras that `pip install` of this package knows."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
