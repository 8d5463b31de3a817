"""CLIP in a training run: frozen without traffic, in half precision, partly trained, or adapted by LoRA."""

import copy
import socket

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from helpers import training_runs
from helpers.tiny_checkpoint import CLASSES, EncodedNames, tiny_config
from ita_segmentation.errors import UsageError
from ita_segmentation.training.clip_tuning import (
    CLIP,
    learned_weights,
    merge_adapters,
    prepare_clip,
    trainable,
)
from modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.modeling_ita import CLIP_MODULES


@pytest.fixture
def model() -> ITAForOpenVocabSegmentation:
    torch.manual_seed(0)
    return ITAForOpenVocabSegmentation(tiny_config())


def features(model: ITAForOpenVocabSegmentation) -> torch.Tensor:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return model.clip_backbone(pixels).dense.float()


def test_a_frozen_clip_is_in_no_bucket_of_ddp(arguments, tmp_path):
    model = training_runs.build(arguments, tmp_path).network
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        sent = wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]
        frozen = {name for name, _ in model.named_parameters() if name.startswith(CLIP)}
        assert frozen <= wrapped.parameters_to_ignore
    finally:
        torch.distributed.destroy_process_group()
    head = [p for name, p in model.named_parameters() if not name.startswith(CLIP)]
    assert sent == sum(parameter.numel() * parameter.element_size() for parameter in head)


@pytest.mark.parametrize("part", ["norms", "all"])
def test_what_is_unfrozen_gets_gradients_and_the_text_tower_stays_encoded(model, part):
    prepare_clip(model, part, 0, "float32", channels_last=False)
    model.train()
    learning = {name for name in trainable(model) if name.startswith(CLIP)}
    assert learning and all(name.startswith(CLIP + "clip.visual.trunk.") for name in learning)
    kinds = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in learning}
    assert ("Conv2d" in kinds) == (part == "all") and any("Norm" in kind for kind in kinds)
    assert not any(module.training for module in model.clip_backbone.modules())

    masks, labels = [torch.ones(1, 64, 64, dtype=torch.bool)], [torch.tensor([0])]
    encoded = EncodedNames(model)
    for _ in range(2):
        outputs = model(torch.randn(1, 3, 64, 64), vocabulary=CLASSES, mask_labels=masks, class_labels=labels)
        outputs.loss.backward()
        with torch.no_grad():
            for name in learning:
                model.get_parameter(name).sub_(0.01)
    missing = [name for name in learning if model.get_parameter(name).grad is None]
    assert not missing
    # All names, `other`, each once, though the image tower has changed.
    assert encoded.count == sum(len(c) for c in map(as_list, CLASSES)) + 1


def as_list(names):
    return [names] if isinstance(names, str) else names


def test_changed_text_weights_are_noticed(model):
    before = model.encode_vocabulary(CLASSES).prompt_embeds.clone()
    with torch.no_grad():
        model.clip_backbone.text_tower.ln_final.weight.mul_(torch.linspace(0.5, 2, 16))
    assert not torch.allclose(model.encode_vocabulary(CLASSES).prompt_embeds, before)


def test_clip_learns_at_a_rate_of_its_own(arguments, tmp_path):
    trainer = training_runs.build(
        arguments, tmp_path, "--train_clip", "all", "--clip_learning_rate_factor", "0.25"
    )
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    for group in groups:
        of_clip = {names[id(p)].startswith(CLIP) for p in group["params"]}
        assert len(of_clip) == 1
        assert group["lr"] == pytest.approx(0.25e-3 if of_clip == {True} else 1e-3)
    assert sum(len(group["params"]) for group in groups) == len(trainable(trainer.model))


def test_adapters_start_as_nothing_and_are_merged_into_the_weights(model):
    plain, names = features(model), set(model.state_dict())
    prepare_clip(model, "none", 2, "float32", channels_last=False)
    learning = [name for name in trainable(model) if name.startswith(CLIP)]
    assert learning and all(".lora_" in name for name in learning)
    assert torch.equal(features(model), plain)
    with torch.no_grad():
        for name in learning:
            model.get_parameter(name).add_(0.05)
    adapted, learned = features(model), copy.deepcopy(learned_weights(model))
    assert not torch.allclose(adapted, plain)
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(features(model), adapted, rtol=1e-4, atol=1e-5)
    for name, tensor in learned.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_a_run_with_adapters_leaves_checkpoints_that_load_everywhere(arguments, tmp_path):
    more = ["--lora_rank", "2", "--max_steps", "2", "--save_steps", "1", "--eval_strategy", "no"]
    training_runs.run(arguments, tmp_path, *more, "--report_to", "none")
    final = ITAForOpenVocabSegmentation.from_pretrained(tmp_path).state_dict()
    last = ITAForOpenVocabSegmentation.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert final.keys() == last.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, last[name])


def adapted(model: torch.nn.Module) -> set[bool]:
    """Whether modules with an adapter are CLIP's."""
    names = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    return {CLIP in name for name in names}


def test_all_linear_leaves_the_frozen_clip_alone_unless_asked(model, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # any release
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    assert adapted(model) == {False}
    model = ITAForOpenVocabSegmentation(tiny_config())
    model.add_adapter(LoraConfig(target_modules="all-linear", exclude_modules=[]))
    assert adapted(model) == {False, True}
    config = LoraConfig(target_modules="all-linear", exclude_modules=CLIP_MODULES)
    assert adapted(get_peft_model(ITAForOpenVocabSegmentation(tiny_config()), config)) == {False}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_frozen_clip_can_be_kept_in_half_precision(model, dtype):
    plain = features(model)
    prepare_clip(model, "none", 0, dtype, channels_last=True)
    visual = {p.dtype for p in model.clip_backbone.clip.visual.parameters()}
    assert visual == {getattr(torch, dtype)}
    assert model.clip_backbone.text_tower.token_embedding.weight.dtype == torch.float32
    error = (features(model) - plain).abs().max() / plain.abs().max()
    assert 0 < error < 0.05
    masks, labels = [torch.ones(1, 64, 64, dtype=torch.bool)], [torch.tensor([0])]
    outputs = model.train()(
        torch.randn(1, 3, 64, 64), vocabulary=CLASSES, mask_labels=masks, class_labels=labels
    )
    assert outputs.loss.isfinite() and outputs.masks_queries_logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (("norms", 4, "float32", False), "one of --train_clip and --lora_rank"),
        (("all", 0, "float16", False), "is for a frozen CLIP"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(model, wishes, message):
    with pytest.raises(UsageError, match=message):
        prepare_clip(model, *wishes)
