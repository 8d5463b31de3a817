"""From any image to the network's input, and from label maps to masks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Mask2FormerImageProcessor

from modeling_ita.image_io import image_to_rgb
from modeling_ita.image_processing_ita import ITAImageProcessor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(scope="module")
def processor():
    return ITAImageProcessor()


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8))


def seen(processor, image):
    """The 8-bit RGB that the network is given for an image fed at its own size, (H, W, 3)."""
    inputs = processor(image, do_resize=False, return_tensors="pt")
    height, width = inputs.pixel_mask[0].amax(1).sum(), inputs.pixel_mask[0].amax(0).sum()
    pixels = (inputs.pixel_values[0] * STD + MEAN) * 255
    return pixels[:, :height, :width].round().permute(1, 2, 0).to(torch.uint8).numpy()


# --- sizes and numbers ----------------------------------------------------------------------------------------


def test_images_of_any_sizes_are_padded_to_a_common_multiple_of_32(processor):
    images = [
        Image.new("RGB", (50, 40), "white"),
        Image.new("L", (30, 70)),
        torch.zeros(3, 5, 5, dtype=torch.uint8),
    ]
    inputs = processor(images, do_resize=False, return_tensors="pt")
    assert inputs.pixel_values.shape == (3, 3, 96, 64)
    assert inputs.pixel_values.dtype == torch.float32
    assert inputs.pixel_mask.dtype == torch.int64
    assert inputs.pixel_mask.flatten(1).sum(1).tolist() == [50 * 40, 30 * 70, 25]
    assert inputs.pixel_mask[0, :40, :50].all()
    assert not inputs.pixel_values[0, :, 40:].any()
    assert torch.allclose(inputs.pixel_values[0, :, 0, 0], ((1 - MEAN) / STD).flatten())


def test_numbers_are_those_of_mask2formers_processor(image):
    settings = {"size": {"shortest_edge": 64, "longest_edge": 200}}
    ours = ITAImageProcessor(**settings)(image, return_tensors="pt")
    theirs = Mask2FormerImageProcessor(
        **settings, image_mean=MEAN.flatten().tolist(), image_std=STD.flatten().tolist()
    )
    expected = theirs(image, size={"height": 64, "width": 96}, return_tensors="pt")
    assert torch.equal(ours.pixel_values, expected.pixel_values)
    assert torch.equal(ours.pixel_mask, expected.pixel_mask)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((10, 20_000), (1, 1333)), ((4, 90_000), (1, 1333)), ((1, 1), (800, 800)), ((300, 200), (1200, 800))],
)
def test_the_default_size_keeps_a_pixel_each_way(processor, shape, expected):
    inputs = processor(np.zeros((*shape, 3), np.uint8), return_tensors="pt")
    assert inputs.pixel_mask.sum() == expected[0] * expected[1]
    assert inputs.pixel_mask[0, expected[0] - 1, expected[1] - 1] == 1
    assert all(side % 32 == 0 and side >= 32 for side in inputs.pixel_values.shape[-2:])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 20}, (20, 30)),
        (20, (20, 30)),
        ({"longest_edge": 30}, (20, 30)),
        ({"height": 33, "width": 7}, (33, 7)),
        ({"max_height": 10, "max_width": 90}, (10, 15)),
    ],
)
def test_every_form_of_size_is_understood(processor, image, size, expected):
    mask = processor(image, size=size, return_tensors="pt").pixel_mask[0]
    assert (mask.amax(1).sum(), mask.amax(0).sum()) == expected


def test_pad_size_and_its_limit(processor, image):
    assert processor(image, do_resize=False, pad_size={"height": 64, "width": 128}).pixel_mask.shape == (
        1,
        64,
        128,
    )
    with pytest.raises(ValueError, match="pad_size"):
        processor(image, do_resize=False, pad_size={"height": 32, "width": 64})


# --- what a person sees ---------------------------------------------------------------------------------------


def test_pil_numpy_torch_paths_and_batches_give_the_same(processor, image, tmp_path):
    pil_image = image
    pil_image.save(tmp_path / "image.png")
    array = np.array(pil_image)
    for image in (
        pil_image,
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        array.astype(np.float32),
        array.astype(np.int64),
        array.astype(np.uint16) * 257,
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        [array],
        array[None],
        [[pil_image]],
    ):
        assert np.array_equal(seen(processor, image), array)
    assert len(processor(np.stack([array, array]), do_resize=False).pixel_values) == 2


def test_exif_orientation_is_applied(processor, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.array(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(seen(processor, Image.open(tmp_path / "turned.png")), expected)
    assert np.array_equal(seen(processor, str(tmp_path / "turned.png")), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_without_transparency_look_as_pil_shows_them(processor, image, mode):
    converted = image.convert(mode)
    assert np.array_equal(seen(processor, converted), np.array(converted.convert("RGB")))


def test_transparency_is_laid_over_white(processor):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 255, 0, 0, 255
    rgba[0, 1] = 255, 0, 0, 128
    expected = [[[255, 0, 0], [255, 127, 127]], [[255, 255, 255], [255, 255, 255]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.info["transparency"] = 1
    gray = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), "LA")
    assert seen(processor, Image.fromarray(rgba, "RGBA")).tolist() == expected
    assert seen(processor, rgba).tolist() == expected
    assert seen(processor, palette).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert seen(processor, gray).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_to_eight(processor, tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "gray.png")
    expected = [[[0] * 3, [100] * 3, [255] * 3]]
    for image in (Image.open(tmp_path / "gray.png"), Image.fromarray(values.astype(np.int32), "I"), values):
        assert seen(processor, image).tolist() == expected
    assert (
        seen(processor, Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())).tolist() == expected
    )


def test_wide_integers_and_floats_are_scaled_by_the_range_that_holds_them(processor):
    assert seen(processor, Image.fromarray(np.array([[0, 255]], np.int32))).tolist() == [[[0] * 3, [255] * 3]]
    assert seen(processor, Image.fromarray(np.array([[0, 1]], np.float32))).tolist() == [[[0] * 3, [255] * 3]]


def test_an_animation_shows_its_first_frame(processor, tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (seen(processor, Image.open(tmp_path / "moving.gif")) == (255, 0, 0)).all()


def test_a_gray_array_becomes_three_channels(processor):
    for gray in (np.full((4, 6), 7, np.uint8), np.full((4, 6, 1), 7, np.uint8), torch.full((1, 4, 6), 7)):
        assert seen(processor, gray).shape == (4, 6, 3)
        assert (seen(processor, gray) == 7).all()


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [[]],
        None,
        7,
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((5, 8, 8), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 1, 3, 4, 4), np.uint8),
        np.full((4, 4, 3), np.nan),
        torch.full((3, 4, 4), torch.inf),
        np.full((4, 4, 3), -1),
        np.full((4, 4, 3), 256),
        np.full((4, 4, 3), "a"),
        np.zeros((4, 4, 3), np.complex64),
        Image.fromarray(np.full((4, 4), np.nan, np.float32)),
        Image.new("LAB", (4, 4)),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(processor, bad):
    with pytest.raises(ValueError) as error:
        processor(bad, return_tensors="pt")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_an_image_is_left_as_it_was(image):
    before = image.tobytes()
    image_to_rgb(image)
    assert image.tobytes() == before


# --- label maps -----------------------------------------------------------------------------------------------


def test_a_label_map_becomes_one_mask_for_each_label(processor):
    labels = np.zeros((20, 30), np.uint8)
    labels[5:, 10:] = 3
    labels[0] = 255
    inputs = processor(
        np.zeros((20, 30, 3), np.uint8), labels, do_resize=False, ignore_index=255, return_tensors="pt"
    )
    [masks], [classes] = inputs.mask_labels, inputs.class_labels
    assert classes.tolist() == [0, 3]
    assert classes.dtype == torch.int64
    assert masks.dtype == torch.float32
    assert masks.shape == (2, 32, 32)
    assert torch.equal(masks[1, :20, :30], torch.from_numpy(labels == 3).float())
    assert masks.sum() == (labels != 255).sum()


def test_segment_ids_are_mapped_to_classes_for_each_image(processor):
    images = [np.zeros((8, 8, 3), np.uint8)] * 2
    maps = [np.array([[1, 2]]).repeat(4, 1).repeat(8, 0), Image.fromarray(np.full((8, 8), 70_000, np.int32))]
    inputs = processor(images, maps, [{1: 5, 2: 5}, {70_000: 9}], do_resize=False, return_tensors="pt")
    assert [one.tolist() for one in inputs.class_labels] == [[5, 5], [9]]
    with pytest.raises(ValueError, match="lacks the labels"):
        processor(images, maps, {1: 5, 2: 5}, do_resize=False)


def test_reduced_labels_lose_the_background_and_keep_what_is_ignored(processor):
    labels = np.array([[0, 1, 2, 255]]).repeat(8, 1).repeat(32, 0)
    image = np.zeros((32, 32, 3), np.uint8)
    settings = {"do_resize": False, "do_reduce_labels": True}
    inputs = processor(image, labels, ignore_index=255, **settings)
    assert inputs.class_labels[0].tolist() == [0, 1]
    assert inputs.mask_labels[0].sum((1, 2)).tolist() == [256, 256]
    mapped = processor(image, labels, {0: 0, 1: 4, 2: 0, 255: 0}, ignore_index=255, **settings)
    assert mapped.class_labels[0].tolist() == [3]
    with pytest.raises(ValueError, match="ignore_index"):
        processor(image, labels, **settings)


def test_a_map_with_nothing_but_ignored_pixels_has_no_masks(processor):
    inputs = processor(
        np.zeros((20, 30, 3), np.uint8),
        np.full((20, 30), 255),
        do_resize=False,
        ignore_index=255,
        return_tensors="pt",
    )
    assert inputs.mask_labels[0].shape == (0, 32, 32)
    assert inputs.class_labels[0].shape == (0,)


def test_maps_are_resized_with_their_images_to_the_nearest_label(processor):
    labels = np.array([[16_777_217, 2]]).repeat(20, 1).repeat(20, 0)
    inputs = processor(
        np.zeros((20, 40, 3), np.uint8), labels, size={"height": 50, "width": 64}, return_tensors="pt"
    )
    assert inputs.class_labels[0].tolist() == [2, 16_777_217]
    assert inputs.mask_labels[0].sum((1, 2)).tolist() == [50 * 32, 50 * 32]
    assert inputs.mask_labels[0].shape == (2, 64, 64)


@pytest.mark.parametrize(
    "maps", [np.zeros((9, 8)), [np.zeros((8, 8))] * 2, np.zeros((8, 8, 3)), Image.new("RGB", (8, 8))]
)
def test_maps_that_do_not_fit_are_refused(processor, maps):
    with pytest.raises(ValueError, match="segmentation map"):
        processor(np.zeros((8, 8, 3), np.uint8), maps, do_resize=False)


# --- in a checkpoint ------------------------------------------------------------------------------------------


def test_a_saved_processor_loads_without_the_package(tmp_path, image):
    ITAImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_ita.ITAImageProcessor"}
    image.save(tmp_path / "image.png")
    script = (
        "import sys, numpy; from transformers import AutoImageProcessor; "
        "loaded = AutoImageProcessor.from_pretrained('saved', trust_remote_code=True); "
        "numpy.save('pixels.npy', loaded('image.png', return_tensors='np')['pixel_values']); "
        "loaded.save_pretrained('again'); "
        "assert 'image_processing_ita' not in sys.modules"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    expected = ITAImageProcessor.from_pretrained(tmp_path / "saved")(image, return_tensors="np")[
        "pixel_values"
    ]
    assert np.array_equal(np.load(tmp_path / "pixels.npy"), expected)
    assert (tmp_path / "again" / "image_processing_ita.py").exists()


def test_settings_can_be_changed_while_loading(tmp_path):
    ITAImageProcessor().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(
        tmp_path, trust_remote_code=True, do_resize=False, ignore_index=255
    )
    assert (loaded.do_resize, loaded.ignore_index, loaded.size_divisor) == (False, 255, 32)
