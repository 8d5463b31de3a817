"""Large vocabularies are encoded once: what is kept on disk is what was encoded, or it is not used."""

import copy
import json
import logging
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from helpers.tiny_checkpoint import EncodedNames, tiny_clip, tiny_config
from modeling_ita import clip_backbone, text_cache
from modeling_ita import text as text_module
from modeling_ita.configuration_ita import VILD_TEMPLATES
from modeling_ita.modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.text_cache import digest_of

NAMES = [f"thing {number}" for number in range(40)]
TEMPLATES = ["a photo of a {}.", "There is a {} in the scene"]


def build(seed=0) -> ITAForOpenVocabSegmentation:
    torch.manual_seed(seed)
    return ITAForOpenVocabSegmentation(tiny_config(templates=TEMPLATES)).eval()


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of its own, in which eight names are many."""
    monkeypatch.setenv("ITA_TEXT_CACHE", str(tmp_path / "text"))
    monkeypatch.setattr(text_module, "MIN_NAMES_ON_DISK", 8)
    monkeypatch.setattr(text_module, "NAMES_PER_BLOCK", 16)
    return tmp_path / "text"


@pytest.fixture
def warnings(caplog):
    logger = logging.getLogger("modeling_ita")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def encode(names=NAMES, seed=0, **kwargs):
    model = build(seed)
    counter = EncodedNames(model)
    return model.encode_vocabulary(names, **kwargs), counter.count


def files(store):
    return sorted(store.rglob("*.safetensors"))


def names_in(file) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.get_tensor("names").numpy().tobytes())


def assert_equal(found, expected):
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.name_embeds, expected.name_embeds)


def test_a_second_process_encodes_nothing_and_has_the_same_bits(store):
    first, encoded = encode()
    assert encoded == len(NAMES) + 1 and len(files(store)) == 3  # 41 names, 16 a file
    second, encoded = encode()
    assert encoded == 0
    assert_equal(second, first)


def test_what_is_kept_is_what_would_be_encoded(store, monkeypatch):
    encode()
    kept, _ = encode()
    monkeypatch.setenv("ITA_TEXT_CACHE", "off")
    fresh, encoded = encode()
    assert encoded == len(NAMES) + 1
    assert_equal(kept, fresh)


def test_another_vocabulary_encodes_only_its_new_names(store):
    encode()
    mixed = [*reversed(NAMES[10:30]), "lamp", ["chair", NAMES[3]]]
    found, encoded = encode(mixed)
    assert encoded == 2
    expected, _ = encode(mixed, seed=0)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"templates": ["a drawing of a {}."]}], ids=["weights", "templates"]
)
def test_other_weights_and_other_templates_share_nothing(change):
    encode()
    _, encoded = encode(**change)
    assert encoded == len(NAMES) + 1


def test_small_vocabularies_stay_in_memory(store):
    encode(NAMES[:5])
    assert files(store) == []


def test_no_folder_no_store(store, monkeypatch, tmp_path):
    monkeypatch.setenv("ITA_TEXT_CACHE", "off")
    encode()
    assert not store.exists()


def rewrite(file, change):
    """Write a file again with other tensors and the digest that fits them, as a faulty writer would."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("names", "prompt_embeds", "name_embeds")}
    tensors = {
        name: tensor if name == "names" else change(tensor).contiguous() for name, tensor in tensors.items()
    }
    save_file(tensors, file, metadata={"digest": digest_of((), tuple(tensors.values()))})


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip_a_bit,
    "emptied": lambda file: file.write_bytes(b""),
    "other content": lambda file: file.write_bytes(b"not a file of tensors at all" * 20),
    "too narrow": lambda file: rewrite(file, lambda embeds: embeds[:, :-1]),
    "too few rows": lambda file: rewrite(file, lambda embeds: embeds[:-1]),
    "NaN": lambda file: rewrite(file, lambda embeds: embeds.index_fill(0, torch.tensor([2]), float("nan"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_deleted_and_made_again(store, warnings, damage):
    expected, _ = encode()
    victim = files(store)[0]
    with safe_open(victim, framework="pt") as file:
        rows = len(file.get_tensor("prompt_embeds"))
    DAMAGES[damage](victim)
    found, encoded = encode()
    assert encoded == rows
    assert_equal(found, expected)
    assert "is damaged and is deleted" in warnings.text and victim.name in warnings.text
    assert encode()[1] == 0


def test_a_damaged_file_that_cannot_be_deleted_is_passed_over(store, warnings, monkeypatch):
    expected, _ = encode()
    victim = files(store)[0]
    victim.write_bytes(b"")

    def read_only(path, missing_ok=False):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("pathlib.Path.unlink", read_only)
    found, _ = encode()
    assert_equal(found, expected)
    assert "is passed over" in warnings.text and victim.name in warnings.text


def test_the_least_recently_used_files_are_deleted_beyond_the_limit(store, monkeypatch):
    encode(NAMES[:15])  # with "other", one file
    encode([f"second {number}" for number in range(16)])
    [first] = [file for file in files(store) if NAMES[0] in names_in(file)]
    for file in files(store):
        os.utime(file, (0, 0) if file == first else (1, 1))
    encode(NAMES[:15])  # is used once more
    monkeypatch.setenv("ITA_TEXT_CACHE_MB", str(2.5 * first.stat().st_size / 1e6))
    encode([f"third {number}" for number in range(16)])
    left = {name for file in files(store) for name in names_in(file)}
    assert {NAMES[0], "third 0"} <= left and "second 0" not in left
    assert sum(file.stat().st_size for file in files(store)) <= 2.5 * first.stat().st_size


def test_a_limit_that_is_no_number_is_a_warning(store, warnings, monkeypatch):
    monkeypatch.setenv("ITA_TEXT_CACHE_MB", "plenty")
    encode()
    assert "ITA_TEXT_CACHE_MB is not a number" in warnings.text and len(files(store)) == 3


def test_an_encoder_told_so_keeps_no_name_on_the_disk_and_reads_none(store):
    model = build()
    model.text_encoder.use_disk = False
    model.encode_vocabulary(NAMES)
    assert not store.exists()
    encode()
    model = build()
    model.text_encoder.use_disk, counter = False, EncodedNames(model)
    model.encode_vocabulary(NAMES)
    assert counter.count == len(NAMES) + 1


def test_an_interrupted_encoding_goes_on_where_it_stopped(store, monkeypatch):
    model, done = build(), []
    encode_tokens = model.clip_backbone.encode_tokens

    def stops_after_20(tokens, prefixes):
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(tokens)
        return encode_tokens(tokens, prefixes)

    monkeypatch.setattr(model.clip_backbone, "encode_tokens", stops_after_20)
    with pytest.raises(KeyboardInterrupt):
        model.encode_vocabulary(NAMES)
    assert len(files(store)) == 1
    _, encoded = encode()
    assert encoded == len(NAMES) + 1 - 16


def test_a_folder_that_cannot_be_written_costs_a_warning(store, warnings):
    store.write_text("a file, where the folder should be")
    found, encoded = encode()
    assert encoded == len(NAMES) + 1 and len(found.prompt_embeds) == len(NAMES)
    assert "encoded names cannot be kept" in warnings.text


def test_batches_of_one_shape_change_nothing_but_rounding(monkeypatch):
    names = ["cat", "dog", "a very tall ladder", "sofa", "wall clock", "tree", "car"]
    alone, _ = encode(names)
    monkeypatch.setattr(
        text_module.TextEncoder,
        "_batches",
        lambda self, tokens: iter([([0, 1, 3, 5, 6], 8), ([2], 8), ([4], 8)]),
    )
    model = build()
    model.text_encoder._encode(names, tuple(TEMPLATES), tqdm(disable=True))
    together, name_embeds = model.text_encoder._encode(names, tuple(TEMPLATES), tqdm(disable=True))
    torch.testing.assert_close(together, alone.prompt_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(name_embeds, alone.name_embeds[:7], rtol=0, atol=1e-5)


def test_batches_hold_every_name_once_and_one_length_each(monkeypatch):
    encoder = build().text_encoder
    monkeypatch.setattr(type(encoder.clip), "device", torch.device("meta"))
    monkeypatch.setattr(text_module, "NAMES_PER_BATCH", 3)
    lengths = [5, 6, 5, 5, 7, 5, 6]
    batches = list(encoder._batches([torch.zeros(3, length, dtype=torch.int64) for length in lengths]))
    assert sorted(index for batch, _ in batches for index in batch) == list(range(7))
    assert all(size == 3 and len({lengths[index] for index in batch}) == 1 for batch, size in batches)


def test_more_names_than_memory_holds_still_come_out_right(monkeypatch):
    expected, _ = encode()
    monkeypatch.setattr(text_module, "MAX_CACHED_NAMES", 50)
    model = build()
    model.encode_vocabulary([f"other {number}" for number in range(30)])
    assert_equal(model.encode_vocabulary(NAMES), expected)


@pytest.mark.parametrize("custom_text", [False, True])
def test_prompts_that_begin_alike_share_the_work_and_change_only_in_rounding(monkeypatch, custom_text):
    torch.manual_seed(0)
    clip_config = tiny_clip("modified_resnet", width=32, context_length=24, custom_text=custom_text)
    clip_config["text_cfg"]["layers"] = 3
    config = tiny_config(clip_model_config=clip_config, templates=["{}", "{} here", *VILD_TEMPLATES])
    names = ["cat", "grandfather clock", "a-b c's", "a name that is cut " * 5, "ﬁn", "é"]
    expected = ITAForOpenVocabSegmentation(config).eval()
    shared = copy.deepcopy(expected)
    plain = expected.encode_vocabulary(names)
    used = []

    def encode_rest(*arguments):
        used.append(text_cache.encode_rest(*arguments))
        return used[-1]

    monkeypatch.setattr(clip_backbone, "MIN_SHARED_WEIGHTS", 0)
    monkeypatch.setattr(clip_backbone, "encode_rest", encode_rest)
    found = shared.encode_vocabulary(names)
    torch.testing.assert_close(found.prompt_embeds, plain.prompt_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.name_embeds, plain.name_embeds, rtol=0, atol=1e-6)
    assert len(used) == len(names) + 1 and all(one is not None for one in used)


def test_prompts_that_do_not_begin_like_their_templates_are_encoded_whole():
    clip = build().clip_backbone
    prefixes = text_cache.encode_prefixes(clip.text_tower, [clip.tokenize(["a photo of"])[0][0, :4].tolist()])
    tokens, _ = clip.tokenize(["a cat"])
    with torch.no_grad():
        assert text_cache.encode_rest(clip.text_tower, tokens, prefixes) is None
        assert torch.equal(clip.encode_tokens(tokens, prefixes), clip.encode_tokens(tokens))
