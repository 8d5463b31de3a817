"""Schedules, the moving average, gradient accumulation, checkpointing, precision, and the numbers that are logged."""

import math

import pytest
import torch

from helpers.tiny_checkpoint import tiny_config
from ita_segmentation.training.callbacks import NonFiniteGuard, progress_line
from ita_segmentation.training.ema import WeightAverage, decay_after
from ita_segmentation.training.metrics import count_dominant_classes, count_text_queries
from ita_segmentation.training.schedules import MinuteBudget, build_scheduler, learning_rate_factor
from modeling_ita import ITAForOpenVocabSegmentation, set_criterion
from modeling_ita.set_criterion import Matches

POINTS = 48


def same_points(num_masks: int, count: int, device: torch.device | str) -> torch.Tensor:
    table = torch.rand(3 * POINTS, 2, generator=torch.Generator().manual_seed(5))
    return table[:count].expand(num_masks, -1, -1).clone()


def make_model(**changes) -> ITAForOpenVocabSegmentation:
    torch.manual_seed(0)
    return ITAForOpenVocabSegmentation(tiny_config(train_num_points=POINTS, **changes)).train()


def make_batch(counts: tuple[int, ...]) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(len(counts), 3, 64, 64, generator=generator),
        "mask_labels": [torch.rand(n, 64, 64, generator=generator) > 0.5 for n in counts],
        "class_labels": [torch.randint(2, (n,), generator=generator) for n in counts],
    }


def gradients(model: ITAForOpenVocabSegmentation) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------
# Schedules and average


def test_schedules_go_where_they_should():
    assert [learning_rate_factor("step", p) for p in (0, 0.88, 0.9, 0.97)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [learning_rate_factor("step", p, [0.5]) for p in (0.4, 0.6)] == pytest.approx([1, 0.1])
    assert learning_rate_factor("cosine", 0.5) == pytest.approx(0.5)
    assert learning_rate_factor("poly", 0.5) == pytest.approx(0.5**0.9)
    assert all(learning_rate_factor(name, 1.2) == pytest.approx(0) for name in ("cosine", "linear", "poly"))
    assert learning_rate_factor("constant", 0.99) == 1
    with pytest.raises(ValueError, match="no learning rate schedule"):
        learning_rate_factor("sawtooth", 0)


def test_warm_up_is_linear_and_the_schedule_follows_whichever_is_further_of_steps_and_minutes():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    budget = MinuteBudget(10.0)
    scheduler = build_scheduler(optimizer, "linear", 100, 3, [], budget)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.25, 0.5 * 0.99, 0.75 * 0.98, 0.97])
    budget.minutes = 5.0
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5)


def test_a_resumed_budget_counts_the_minutes_before():
    budget = MinuteBudget(4.0)
    budget.start(minutes_before=3.0)
    assert budget.progress == pytest.approx(0.75, abs=0.01) and not budget.is_spent


def test_the_average_is_the_one_worked_out_by_hand_and_goes_on_from_its_file(tmp_path):
    assert [decay_after(n, 0.9) for n in (1, 10, 1000)] == pytest.approx([2 / 11, 11 / 20, 0.9])
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage({"w": weight}, decay=0.9)
    for value in (1.0, 4.0, 7.0):
        weight.data.fill_(value)
        average.update()
    # The first is copied; then 2/11 and 3/12 of the average remain.
    expected = 0.25 * (2 / 11 * 1 + 9 / 11 * 4) + 0.75 * 7
    assert average.state()["w"].item() == pytest.approx(expected)
    with average.in_place():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 7.0

    average.save(tmp_path / "average.safetensors")
    resumed = WeightAverage({"w": weight}, decay=0.9)
    resumed.load(tmp_path / "average.safetensors")
    average.update()
    resumed.update()
    assert torch.equal(average.state()["w"], resumed.state()["w"])


# ------------------------------------------------------------------------------------------------------------
# Gradients


def test_accumulated_batches_give_the_gradients_of_one_large_batch(monkeypatch):
    monkeypatch.setattr(set_criterion, "draw_points", same_points)
    counts = (3, 1, 0, 2)
    batch = make_batch(counts)
    whole = make_model()
    loss = whole(**batch).loss
    loss.backward()

    parts = make_model()
    parts.criterion.begin_step([[3, 1], [0, 2]])
    total = 0.0
    for images in (slice(0, 2), slice(2, 4)):
        part = parts(**{name: values[images] for name, values in batch.items()}).loss / 2
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients(whole)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * largest)


def test_activation_checkpointing_of_the_head_changes_no_gradient(monkeypatch):
    monkeypatch.setattr(set_criterion, "draw_points", same_points)
    plain, frugal = make_model(), make_model()
    frugal.activation_checkpointing_enable()
    assert frugal.image_text_aggregation.layers[0].gradient_checkpointing
    for model in (plain, frugal):
        model(**make_batch((2, 1))).loss.backward()
    expected = gradients(plain)
    for name, gradient in gradients(frugal).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_sampling_and_losses_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(set_criterion, "draw_points", same_points)
    model = make_model()
    seen = []
    attention = model.detail_enhancement.layers[0].attention
    attention.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype):
            outputs = model(**make_batch((2, 1)))
        assert {loss.dtype for loss in outputs.loss_dict.values()} == {torch.float32}
        scaler.scale(outputs.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------
# Numbers


def test_matched_text_queries_are_the_first_of_each_image():
    matches = Matches(torch.tensor([[0, 5, 7], [1, 3, 8]]), torch.zeros(2, 3), [2, 1], num_queries=5)
    # Within their images: 0, 0, 2 and 1, 3, 3; the first two of each are text queries.
    assert count_text_queries(matches, 2).item() == 3


def test_a_class_counts_once_and_is_dominant_by_any_of_its_names():
    vocabulary = [["sky"], ["dog", "puppy"], ["grass"]]
    labels = [torch.tensor([1, 1, 2]), torch.tensor([0])]
    shown, found = count_dominant_classes([["puppy", "sky"], ["other"]], [vocabulary] * 2, labels)
    assert (shown.item(), found.item()) == (3, 1)


def test_the_guard_names_the_first_non_finite_step():
    guard = NonFiniteGuard(torch.device("cpu"), batches_per_step=2, every=2)
    for step in (1, 2, 3):
        for half in "ab":
            loss = torch.tensor([1.0, float("nan") if (step, half) == (2, "b") else 2.0])
            guard.record(step, [f"{step}{half}"], loss)
    assert guard.check(stop_requested=True) == (2, True)
    batches = guard.batches_of(2, ["loss_ce", "loss_mask"])
    assert [batch["image_names"] for batch in batches] == [["2a"], ["2b"]]
    assert batches[1]["losses"] == {"loss_ce": 1.0, "loss_mask": "nan"}
    fine = NonFiniteGuard(torch.device("cpu"), 1, 1)
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(2)).backward()
    fine.record_gradient(1, layer)
    assert fine.check(stop_requested=False) == (None, False)
    layer.weight.grad[0, 0] = float("inf")
    fine.record_gradient(2, layer)
    assert fine.check(stop_requested=False) == (2, False)


def test_the_progress_line_says_what_is_left():
    logs = {"loss": 31.2, "learning_rate": 1e-4, "images_per_second": 3.14, "eta_minutes": 90.0}
    line = progress_line(50, 1000, logs)
    assert line == "step 50/1000  loss 31.200  lr 1.00e-04  3.1 images/s  1:30:00 left"
    assert progress_line(50, 1000, {"eval_miou": 0.5, "epoch": 2}) == "step 50/1000  eval_miou 0.5"
