"""Overlays, their legend and their palette."""

import numpy as np
import pytest
from PIL import Image

from ita_segmentation.visualization import (
    MAX_LEGEND_ENTRIES,
    MAX_OVERLAY_PIXELS,
    PALETTE,
    assign_colors,
    color_of,
    draw_overlay,
)

TO_CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
TO_LAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
VISION: dict = {  # Machado, Oliveira and Fernandes, 2009: full dichromacy, on linear RGB
    "normal": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
}


def oklab_distances(colors, vision: str) -> np.ndarray:
    """Distances of every pair of 8-bit colors in Oklab, as seen with this vision."""
    share = np.asarray(colors) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    lab = np.cbrt(seen @ np.transpose(TO_CONES)) @ np.transpose(TO_LAB)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distances[np.triu_indices(len(colors), 1)]


@pytest.mark.parametrize(("vision", "few", "many"), [("normal", 0.12, 0.1), ("protanopia", 0.075, 0.06)])
def test_the_colors_of_one_image_can_be_told_apart(vision, few, many):
    """Also those of classes far apart in a long vocabulary, as "snow" and "sheep" are."""
    generator = np.random.default_rng(0)
    for count, least in [(2, few), (5, few), (8, few), (24, many)] * 5:
        ids = generator.choice(847, count, replace=False).tolist()
        assert oklab_distances(list(assign_colors(ids).values()), vision).min() >= least
    assert len(set(assign_colors([3, 27, 51, 75, 171]).values())) == 5


def test_a_class_keeps_its_color_where_it_can():
    assert assign_colors([5, 9]) == {5: color_of(5), 9: color_of(9)}
    before = assign_colors([5, 29])
    assert before[5] == color_of(5) == color_of(29) != before[29]
    later = assign_colors([29, 7, 5], before)
    assert {index: later[index] for index in before} == before
    assert set(assign_colors(range(60)).values()) == set(PALETTE)


def test_only_ids_of_the_legend_are_painted_in_their_color():
    image = Image.new("RGB", (40, 30), (10, 20, 30))
    ids = np.zeros((30, 40), int)
    ids[:, 20:] = 7
    overlay = np.asarray(draw_overlay(image, ids, [(7, "cat", 0.9)], alpha=1.0))
    assert tuple(overlay[15, 5]) == (10, 20, 30)
    assert tuple(overlay[15, 30]) == color_of(7)
    untouched = np.asarray(draw_overlay(image, ids, [(9, "dog", None)]))
    assert untouched.shape == (30, 40, 3)
    assert (untouched == (10, 20, 30)).all()


def test_overlay_and_legend_use_the_same_colors_where_ids_collide():
    ids = np.repeat([[3, 27]], 100, axis=0).repeat(50, axis=1)
    overlay = np.asarray(
        draw_overlay(Image.new("RGB", (100, 100)), ids, [(3, "a", None), (27, "b", None)], 1.0)
    )
    for color in (overlay[50, 20], overlay[50, 80]):
        assert (overlay[:, 100:] == color).all(-1).sum() > 50
    assert tuple(overlay[50, 20]) != tuple(overlay[50, 80])


def test_the_border_between_two_segments_is_outlined_darker():
    ids = np.repeat([[1, 2]], 10, axis=0).repeat(10, axis=1)
    overlay = np.asarray(draw_overlay(Image.new("RGB", (20, 10)), ids, [(1, "a", None), (2, "b", None)], 1.0))
    assert overlay[5, 9].astype(int).sum() < 0.6 * overlay[5, 5].astype(int).sum()


def test_the_legend_does_not_cover_the_image_and_stands_beneath_wide_ones():
    square = draw_overlay(Image.new("RGB", (100, 100)), np.ones((100, 100), int), [(1, "wall", None)])
    assert square.width > 150
    wide = draw_overlay(Image.new("RGB", (400, 100)), np.ones((100, 400), int), [(1, "wall", None)])
    assert wide.width == 400
    assert wide.height > 110


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (3, 500)])
def test_images_of_any_shape_get_a_legend_that_can_be_read(size):
    overlay = draw_overlay(Image.new("RGB", size), np.ones(size[::-1], int), [(1, "a name " * 40, 0.5)])
    assert overlay.width >= size[0]
    assert overlay.height >= size[1]
    assert overlay.width * overlay.height < 60 * size[0] * size[1] + 2_000_000
    strip = np.asarray(overlay)
    assert (strip == 255).all(-1).sum() > 1000  # paper
    assert (strip.max(-1) < 90).sum() > 50  # ink


def test_a_huge_image_is_drawn_smaller(monkeypatch):
    monkeypatch.setattr("ita_segmentation.visualization.MAX_OVERLAY_PIXELS", 40_000)
    overlay = draw_overlay(Image.new("RGB", (500, 400)), np.ones((400, 500), np.uint8), [(1, "sky", None)])
    assert overlay.width * overlay.height < 100_000 < MAX_OVERLAY_PIXELS


def test_many_classes_end_in_and_n_more():
    ids = np.arange(60)[None].repeat(400, 0).repeat(8, 1)

    def drawn(num_classes: int) -> Image.Image:
        legend = [(index, f"class {index:02}", None) for index in range(60)]
        return draw_overlay(Image.new("RGB", ids.shape[::-1]), ids.clip(max=num_classes - 1), legend)

    assert drawn(MAX_LEGEND_ENTRIES).width > drawn(2).width
    assert drawn(60).width < drawn(2).width + 3 * (drawn(2).width - ids.shape[1])


def test_an_overlay_of_another_size_or_strength_is_refused():
    with pytest.raises(ValueError, match="shape"):
        draw_overlay(Image.new("RGB", (4, 5)), np.zeros((4, 5), int), [])
    with pytest.raises(ValueError, match="alpha"):
        draw_overlay(Image.new("RGB", (1, 1)), np.zeros((1, 1), int), [], alpha=1.5)
