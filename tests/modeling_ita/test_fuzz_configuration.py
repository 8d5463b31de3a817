"""Wrong types, absurd sizes and nested nonsense in config.json: a model or one readable line, soon, in little memory.

Seeds are fixed; `make fuzz` tries more of them.
"""

import json
import random
import resource
import time
from typing import Any

import pytest
import torch

from helpers.tiny_checkpoint import tiny_clip, tiny_config
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation

DEEP: Any = 0
for _ in range(50):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 7, 10**6, 10**9, 10**18, -(10**30), 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "32", "a\nb", "x" * 10_000, "\ud800", "../../etc/passwd", [], [[]], [None], [3], ["", ""], ["a", 3], {},
    {"a": 1}, {"a": {"b": []}}, DEEP, [1, 1, 1, 1], [10**9] * 4, [-1] * 4, "hf-hub:someone/model",
    "vit_tiny_patch16_224",
]  # fmt: skip
SECONDS, MEGABYTES, CHARACTERS = 20, 500, 500


def fields_of(content: dict, path: tuple = ()) -> list[tuple]:
    """Give the paths of all fields of a mapping, nested ones too."""
    paths = [(*path, name) for name in content]
    for name, value in content.items():
        if isinstance(value, dict) and name != "id2label":
            paths += fields_of(value, (*path, name))
    return paths


def mutate(content: dict, chance: random.Random) -> dict:
    """Give some field another value, one of two another one too, and now and then take one away."""
    content = json.loads(json.dumps(content))
    for _ in range(chance.choice([1, 1, 2])):
        *parents, name = chance.choice(fields_of(content))
        parent = content
        for step in parents:
            parent = parent[step]
        if chance.random() < 0.05:
            del parent[name]
        else:
            parent[name] = chance.choice(VALUES)
    return content


def load(folder, content: dict) -> str | None:
    """Load a configuration and build its model, without memory as `from_pretrained` does; give the error's line."""
    (folder / "config.json").write_text(json.dumps(content))
    try:
        config = ITAConfig.from_pretrained(folder)
        with torch.device("meta"):
            ITAForOpenVocabSegmentation(config)
    except ValueError as error:
        return str(error)
    return None


def check(folder, seed: int) -> None:
    chance = random.Random(seed)
    tower = chance.choice(["resnet10t", "modified_resnet"])
    content = tiny_config(clip_model_config=tiny_clip(tower)).to_dict()
    changed = mutate(content, chance)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    line = load(folder, changed)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1000 * MEGABYTES
    assert line is None or ("\n" not in line and 0 < len(line) < CHARACTERS)


@pytest.mark.parametrize("block", range(4))
def test_fuzz_of_configurations(tmp_path, block):
    for seed in range(25 * block, 25 * (block + 1)):
        check(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_longer_fuzz_of_configurations(tmp_path, block):
    for seed in range(1000 + 100 * block, 1000 + 100 * (block + 1)):
        check(tmp_path, seed)
