"""Settings of the image processor that somebody else wrote: they work, or are refused in one line when loaded."""

import json
import random

import numpy as np
import pytest
from transformers import AutoImageProcessor

from modeling_ita import ITAImageProcessor

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 33, 100, 10**6, 10**12, 10**40, 0.0, 0.5, -0.5, 1e-300, 1e300),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "bilinear",
        "33",
        "\ud800",
        [],
        [1],
        [32, 32],
        [1, 2, 3],
    ),
    *([0.5, 0.5, 0.5], [0, 0, 0], ["a", "b", "c"], [None] * 3, [[1]], [float("nan")] * 3, [1e300] * 3),
    *(
        {},
        {"height": 32},
        {"height": 32, "width": 48},
        {"height": 0, "width": 8},
        {"height": "32", "width": 32},
    ),
    *({"shortest_edge": 32}, {"shortest_edge": 10**9}, {"shortest_edge": 1, "longest_edge": 1}, {"edge": 3}),
    *({"max_height": 32, "max_width": 8}, {"height": 10**5, "width": 10**5}, {"height": 32.5, "width": 32}),
    {"longest_edge": [3]},
]
SETTINGS = sorted(
    {
        "do_resize",
        "size",
        "max_size",
        "resample",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
    }
    | {"image_std", "size_divisor", "pad_size", "ignore_index", "do_reduce_labels", "default_to_square"}
)
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def load_and_run(folder, changes):
    """What comes of a configuration with these changes: pixels that are numbers, or the one line that refuses it."""
    ITAImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refusal = None
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        pixels = processor(IMAGE, return_tensors="pt").pixel_values
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert pixels.isfinite().all()
    else:
        assert refusal and "\n" not in refusal and len(refusal) < 400
    return refusal


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_works_or_is_refused_in_one_line_that_names_it(tmp_path, name):
    refusals = [load_and_run(tmp_path, {name: value}) for value in VALUES]
    assert None in refusals
    assert sum(refusal is not None for refusal in refusals) > len(VALUES) / 2
    assert all(name in refusal or "size" in name for refusal in refusals if refusal)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed else ()) for seed in range(20)]
)
def test_settings_together_work_or_are_refused_in_one_line(tmp_path, seed):
    choose = random.Random(seed)
    for _ in range(60):
        load_and_run(tmp_path, {name: choose.choice(VALUES) for name in choose.sample(SETTINGS, 3)})


@pytest.mark.parametrize("name", ["size", "image_std", "rescale_factor"])
def test_a_call_is_checked_as_a_file_is(name):
    with pytest.raises(ValueError, match=f"image processor: {name}"):
        ITAImageProcessor()(IMAGE, **{name: 0})


def test_an_image_is_not_enlarged_beyond_all_bounds():
    processor = ITAImageProcessor(size={"shortest_edge": 800})
    with pytest.raises(ValueError, match="would be resized to 800 x 8000000 pixels"):
        processor(np.zeros((1, 10_000, 3), np.uint8))
