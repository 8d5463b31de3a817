"""What a vocabulary means: one form for names, one meaning whatever the batch, and one answer for every thread."""

import copy
import os
import pickle
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny_checkpoint import EncodedNames, tiny_config
from modeling_ita import (
    ITAConfig,
    ITAForOpenVocabSegmentation,
    normal_form,
    normalize_vocabulary,
    parse_classes,
)
from modeling_ita import text as text_module
from modeling_ita.text import with_distractors

NAMES = ["cat", "Water", "teddy bear", "sofa", "french fries", "traffic light", "sky", "grass"]


def build(seed: int = 0, **changes) -> ITAForOpenVocabSegmentation:
    torch.manual_seed(seed)
    return ITAForOpenVocabSegmentation(tiny_config(**changes)).eval()


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return build()


# --- one form of a name ---


@pytest.mark.parametrize("variant", ["water", "WATER", "  Water ", "wa\tter".replace("\t", "")])
def test_capitals_and_blanks_make_no_other_name(variant):
    assert normal_form(variant) == "water"
    model = build(train_vocabulary=["Water"], stuff_names=["wATER"], vocabulary=["a", "b"])
    with torch.no_grad():
        outputs = model(pixels(1, 3, 64, 64), vocabulary=[variant, "cat"])
        expected = model(pixels(1, 3, 64, 64), vocabulary=["Water", "cat"])
    torch.testing.assert_close(outputs.class_queries_logits, expected.class_queries_logits, rtol=0, atol=1e-5)
    assert outputs.stuff_ids == [[0]] and outputs.vocabulary == [[[variant.strip()], ["cat"]]]
    assert model.encode_vocabulary([variant, "cat"]).is_seen.tolist() == [True, False]


def test_composed_and_decomposed_letters_are_one_name():
    assert normal_form("cafe\u0301") == normal_form("caf\u00e9")


def test_a_name_that_differs_in_capitals_is_one_candidate_and_one_synonym(model):
    assert normalize_vocabulary([["Cat", "cat", "CAT "]]) == [["Cat"]]
    assert normalize_vocabulary(["Cat", "cat", "Other"]).candidate_names == ["Cat", "Other"]
    assert model.encode_vocabulary(["Cat", "dog", "cat"]).is_duplicate.tolist() == [False, False, True]


def test_what_was_given_is_what_is_shown(model):
    with torch.no_grad():
        outputs = model(pixels(1, 3, 64, 64), vocabulary=["Sea  Water"])
    assert outputs.vocabulary == [[["Sea  Water"]]]
    assert "Sea  Water" in outputs.dominant_categories[0]


@pytest.mark.parametrize(
    "text", ["cat; sofa|couch; wall", "cat, sofa|couch, wall,", "cat\nsofa|couch\nwall\n"]
)
def test_every_separator_gives_the_same_classes(text):
    assert parse_classes(text) == [["cat"], ["sofa", "couch"], ["wall"]]


def test_a_lone_surrogate_is_refused_by_name():
    with pytest.raises(ValueError, match=r"class 1 .*not valid Unicode"):
        normalize_vocabulary(["cat", "do\udc80g"])


# --- a vocabulary never changes its meaning with the batch ---


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_list_of_synonym_lists_is_one_vocabulary_for_any_number_of_images(model, batch):
    classes = [["teddy bear", "teddy"], ["french fries", "fries"]]
    with torch.no_grad():
        outputs = model(pixels(batch, 3, 64, 64), vocabulary=classes)
    assert outputs.vocabulary == [classes] * batch
    assert outputs.class_queries_logits.shape[-1] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": ["cat"], "vocabularies": [["cat"], ["dog"]]}, "not both"),
        ({"vocabularies": ["cat", "dog"]}, "use vocabulary="),
        ({"vocabularies": [["cat"]]}, "1 vocabularies for 2 images"),
        ({"vocabulary": [[["cat"], ["dog"]], [["cow"]]]}, "use vocabularies="),
    ],
)
def test_what_is_ambiguous_says_which_argument_to_use(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(pixels(2, 3, 64, 64), **arguments)


# --- labels of a configuration ---


def test_labels_with_the_keys_of_json_stay_in_order():
    labels = {str(index): f"name {index}" for index in (0, 1, 10, 11, *range(2, 10))}
    config = ITAConfig(id2label=labels)
    assert list(config.id2label.values()) == config.own_classes == [f"name {index}" for index in range(12)]
    config.id2label = {"1": "b", "0": "a"}
    assert config.own_classes == ["a", "b"]


def test_a_number_of_labels_leaves_no_other_classes(tmp_path):
    tiny_config(vocabulary=NAMES).save_pretrained(tmp_path)
    config = ITAConfig.from_pretrained(tmp_path, num_labels=3)
    assert config.num_labels == 3 and config.own_classes is None
    assert ITAConfig.from_pretrained(tmp_path).own_classes == NAMES


def test_labels_set_later_keep_both_directions_and_fields_are_checked(tmp_path):
    tiny_config(vocabulary=NAMES).save_pretrained(tmp_path)
    config = ITAConfig.from_pretrained(tmp_path, id2label={"1": "b", "0": "a"})
    assert config.own_classes == ["a", "b"] and config.label2id == {"a": 0, "b": 1}
    with pytest.raises(ValueError, match="hidden_dim must be an integer"):
        ITAConfig.from_pretrained(tmp_path, hidden_dim="32")
    with pytest.raises(ValueError, match="list of classes"):
        ITAConfig(vocabulary={"a": 3})


# --- threads, processes, copies ---


def vocabularies(count: int) -> list[list[str]]:
    return [[NAMES[(index + step) % 8] + f" {index // 8}" for step in range(3)] for index in range(count)]


def expected_of(count: int) -> list[torch.Tensor]:
    fresh = build()
    return [fresh.encode_vocabulary(classes).prompt_embeds for classes in vocabularies(count)]


@pytest.mark.parametrize("memory", ["large", "too small"])
def test_threads_that_encode_at_the_same_time_get_what_a_fresh_model_gives(monkeypatch, memory):
    if memory == "too small":
        monkeypatch.setattr(text_module, "MAX_CACHED_VOCABULARIES", 2)
        monkeypatch.setattr(text_module, "MAX_CACHED_NAMES", 10)
    shared, expected, found = build(), expected_of(24), {}
    encoded, start = EncodedNames(shared), threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for index in range(24):
            chosen = (index * (thread + 1)) % 24
            text = shared.encode_vocabulary(vocabularies(24)[chosen])
            found[thread, index] = (chosen, text.prompt_embeds)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 * 24
    if memory == "large":  # nothing is encoded twice
        assert encoded.count == len({name for classes in vocabularies(24) for name in classes}) + 1
    for chosen, embeds in found.values():
        torch.testing.assert_close(embeds, expected[chosen], rtol=0, atol=1e-5)
    for classes, embeds in zip(vocabularies(24), expected, strict=True):  # and afterwards, alone
        torch.testing.assert_close(shared.encode_vocabulary(classes).prompt_embeds, embeds, rtol=0, atol=1e-5)


def test_encoding_that_raises_in_the_middle_leaves_nothing_wrong(monkeypatch):
    model, expected = build(), expected_of(2)
    encode, calls = model.clip_backbone.encode_tokens, []

    def fails_once(tokens, prefixes):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return encode(tokens, prefixes)

    monkeypatch.setattr(model.clip_backbone, "encode_tokens", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode_vocabulary(vocabularies(2)[0])
    for classes, embeds in zip(vocabularies(2), expected, strict=True):
        torch.testing.assert_close(model.encode_vocabulary(classes).prompt_embeds, embeds, rtol=0, atol=1e-5)


def test_a_fork_while_another_thread_encodes_can_encode():
    model, expected = build(), expected_of(1)[0]
    model.encode_vocabulary(["warm"])
    entered, leave = threading.Event(), threading.Event()
    encode = model.clip_backbone.encode_tokens

    def waits(tokens, prefixes):
        entered.set()
        leave.wait(60)
        return encode(tokens, prefixes)

    model.clip_backbone.encode_tokens = waits
    thread = threading.Thread(target=model.encode_vocabulary, args=(["slow"],))
    thread.start()
    entered.wait(60)
    child = os.fork()
    if child == 0:  # the lock's owner does not exist here
        model.clip_backbone.encode_tokens = encode
        torch.set_num_threads(1)
        embeds = model.encode_vocabulary(vocabularies(1)[0]).prompt_embeds
        os._exit(0 if torch.allclose(embeds, expected, rtol=0, atol=1e-5) else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_copies_and_pickles_work_while_other_threads_encode():
    model, expected, stop = build(), expected_of(2), threading.Event()

    def work() -> None:
        index = 0
        while not stop.is_set():
            model.encode_vocabulary([f"name {index}", f"other {index}"])
            index += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        copies = [copy.deepcopy(model) for _ in range(5)] + [pickle.loads(pickle.dumps(model))]
    finally:
        stop.set()
        thread.join()
    for one in copies:
        embeds = one.encode_vocabulary(vocabularies(2)[1]).prompt_embeds
        torch.testing.assert_close(embeds, expected[1], rtol=0, atol=1e-5)


# --- the same classes get the same pixels ---


def spelled(name: str, upper: bool, blanks: bool) -> str:
    name = name.upper() if upper else name
    return f" {name.replace(' ', '  ')} " if blanks else name


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    order=st.permutations(range(5)),
    upper=st.lists(st.booleans(), min_size=5, max_size=5),
    blanks=st.lists(st.booleans(), min_size=5, max_size=5),
    reverse=st.booleans(),
    duplicate=st.sampled_from([None, 0, 1, 3]),
    batch=st.integers(1, 3),
    per_image=st.booleans(),
)
def test_the_same_classes_get_the_same_pixels(
    model, order, upper, blanks, reverse, duplicate, batch, per_image
):
    """Whatever their order and spelling, the order of synonyms, doubled classes, and the vocabularies beside them."""
    names = [["cat"], ["teddy bear", "teddy"], ["Water"], ["sky"], ["french fries", "fries"]]
    images = pixels(3, 3, 64, 64)[:batch]
    spellings = [[spelled(name, upper[i], blanks[i]) for name in names[i]] for i in range(5)]
    orders = [order[i:] + order[:i] if per_image else order for i in range(batch)]
    vocabularies = [[spellings[i][::-1] if reverse else spellings[i] for i in own] for own in orders]
    if duplicate is not None:
        vocabularies = [[*classes, names[duplicate]] for classes in vocabularies]
    arguments = {"vocabularies": vocabularies} if per_image else {"vocabulary": vocabularies[0]}
    with torch.no_grad():
        usual = model(images, vocabulary=names, dominant_categories=["cat"])
        outputs = model(images, **arguments, dominant_categories=["cat"])
    expected, found = usual.class_queries_logits.exp(), outputs.class_queries_logits.exp()
    for index, own in enumerate(orders):
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(found[index, :, :5], expected[index][:, own], **close)
        torch.testing.assert_close(found[index, :, -1], expected[index, :, -1], **close)
        assert (found[index, :, 5:-1] == 0).all()
    torch.testing.assert_close(outputs.masks_queries_logits, usual.masks_queries_logits, rtol=0, atol=1e-4)


# --- distractors ----------------------------------------------------------------------------------------------


OWN = normalize_vocabulary(["dog, puppy", "cat", "sofa, couch", "lady", "glass"])


@pytest.mark.parametrize(
    ("classes", "added"),
    [
        (["unicorn"], ["dog", "cat", "sofa", "lady", "glass"]),
        (["Couch", "CAT "], ["dog", "lady", "glass"]),  # a synonym, and another way to write a name
        (["puppies", "ladies", "glasses"], ["cat", "sofa"]),  # other numbers
        (["a", "b", "c", "d", "e"], []),  # as many as the checkpoint has
    ],
)
def test_distractors_are_the_own_classes_that_share_no_name(classes, added):
    vocabulary, num_classes = with_distractors(classes, OWN)
    assert vocabulary[:num_classes] == normalize_vocabulary(classes)
    assert [names[0] for names in vocabulary[num_classes:]] == added


def test_classes_seen_in_training_are_distractors_too():
    vocabulary, num_classes = with_distractors(
        None, normalize_vocabulary(["cat"]), ["cats", "dog", "Dogs", "sky"]
    )
    assert (vocabulary, num_classes) == ([["cat"], ["dog"], ["sky"]], 1)
    assert with_distractors(None, OWN, ["sky", "cat"]) == (OWN, len(OWN))
    with pytest.raises(ValueError, match="no classes are given"):
        with_distractors(None, None)
