"""The training losses: matching, sampling, weights and empty targets, against slow plain loops."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.dynamic_module_utils import get_imports

from modeling_ita import set_criterion
from modeling_ita.batching import SegmentOutput, matched_mask_logits, merge
from modeling_ita.set_criterion import SetCriterion, linear_assignment, sample_at_points

NUM_CLASSES, NUM_QUERIES, NUM_POINTS = 5, 7, 40


def make_criterion(**changes) -> SetCriterion:
    config = {
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "no_object_weight": 0.1,
        "train_num_points": NUM_POINTS,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
    }
    return SetCriterion(SimpleNamespace(**{**config, **changes}))


def make_batch(counts=(3, 2), num_layers=3, num_queries=NUM_QUERIES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch_size = len(counts)
    class_logits = [
        torch.randn(batch_size, num_queries, NUM_CLASSES + 1, generator=generator).requires_grad_()
        for _ in range(num_layers)
    ]
    mask_logits = [
        (4 * torch.randn(batch_size, num_queries, 9, 11, generator=generator)).requires_grad_()
        for _ in range(num_layers)
    ]
    mask_labels = [torch.rand(n, 36, 44, generator=generator) > 0.6 for n in counts]
    class_labels = [torch.randint(NUM_CLASSES, (n,), generator=generator) for n in counts]
    return class_logits, mask_logits, mask_labels, class_labels


@pytest.fixture
def fixed_points(monkeypatch):
    """Every mask gets the first rows of one table of points, so that an oracle knows them."""
    table = torch.rand(3 * NUM_POINTS, 2, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(
        set_criterion, "draw_points", lambda num_masks, count, device: table[:count].expand(num_masks, -1, -1)
    )
    return table


def read_bilinear(image: torch.Tensor, x: float, y: float) -> float:
    """One bilinear reading of an (h, w) image at (x, y) in 0..1, zero outside, by its definition."""
    height, width = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    total = 0.0
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < height and 0 <= j < width:
            total += (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j].item()
    return total


def read_all(image, points):
    return torch.tensor([read_bilinear(image, x, y) for x, y in points.tolist()])


def bce(x, t):
    return F.binary_cross_entropy_with_logits(x, t)


def dice(x, t):
    p = x.sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def oracle_losses(class_logits, mask_logits, mask_labels, class_labels, table):
    """The three unweighted losses of one prediction, mask by mask and point by point."""
    num_masks = max(sum(map(len, mask_labels)), 1)
    total_mask = total_dice = class_sum = torch.zeros(())
    weight_sum = 0.0
    for image in range(len(mask_labels)):
        n = len(mask_labels[image])
        cost = torch.zeros(NUM_QUERIES, n)
        for q, t in itertools.product(range(NUM_QUERIES), range(n)):
            x = read_all(mask_logits[image, q], table[:NUM_POINTS])
            y = read_all(mask_labels[image][t].float(), table[:NUM_POINTS])
            probability = class_logits[image, q].softmax(0)[class_labels[image][t]]
            cost[q, t] = -2 * probability + 5 * bce(x, y) + 5 * dice(x, y)
        best = min(
            itertools.permutations(range(NUM_QUERIES), n),
            key=lambda queries: sum(cost[q, t].item() for t, q in enumerate(queries)),
        )
        for q in range(NUM_QUERIES):
            label = int(class_labels[image][best.index(q)]) if q in best else NUM_CLASSES
            weight = 1.0 if q in best else 0.1
            class_sum = class_sum + weight * F.cross_entropy(class_logits[image, q], torch.tensor(label))
            weight_sum += weight
        for t, q in enumerate(best):
            logits = mask_logits[image, q]
            order = read_all(logits, table).abs().argsort()[: int(0.75 * NUM_POINTS)]
            points = torch.cat([table[order], table[: NUM_POINTS - len(order)]])
            x, y = read_all(logits, points), read_all(mask_labels[image][t].float(), points)
            total_mask = total_mask + bce(x, y) / num_masks
            total_dice = total_dice + dice(x, y) / num_masks
    return class_sum / weight_sum, total_mask, total_dice


def test_losses_equal_the_plain_loops_of_the_paper(fixed_points):
    batch = make_batch(counts=(3, 0, 2))
    losses = make_criterion()(*batch)
    for index, suffix in [(0, "_0"), (1, "_1"), (2, "")]:
        expected = oracle_losses(batch[0][index], batch[1][index], batch[2], batch[3], fixed_points)
        for name, weight, value in zip(("ce", "mask", "dice"), (2, 5, 5), expected, strict=True):
            assert losses[f"loss_{name}{suffix}"].item() == pytest.approx(weight * value.item(), rel=1e-4)


def test_names_run_from_the_last_prediction_to_the_earlier_ones():
    losses = make_criterion()(*make_batch(num_layers=3))
    assert list(losses) == [
        f"loss_{part}{suffix}" for suffix in ("", "_0", "_1") for part in ("ce", "mask", "dice")
    ]
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4), (5, 0)])
def test_assignment_is_as_cheap_as_the_best_of_all_permutations(shape):
    cost = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    rows, columns = linear_assignment(cost)
    small = cost if shape[0] >= shape[1] else cost.T
    best = min(
        sum(float(small[q, t]) for t, q in enumerate(queries))
        for queries in itertools.permutations(range(small.shape[0]), small.shape[1])
    )
    assert float(cost[rows, columns].sum()) == pytest.approx(best)
    assert columns == sorted(columns) and len(set(rows)) == len(rows) == min(shape)


def test_perfect_predictions_are_found_wherever_they_stand():
    class_logits, mask_logits, _, class_labels = make_batch(counts=(3, 2), num_layers=1)
    seats = [[4, 0, 6], [2, 5]]
    with torch.no_grad():
        mask_labels = [
            F.interpolate((mask_logits[0][image, queries] > 0)[None].float(), size=(36, 44))[0]
            for image, queries in enumerate(seats)
        ]
    matches = make_criterion(class_weight=0.0).match(class_logits, mask_logits, mask_labels, class_labels)
    assert [matches.of(image)[0][0].tolist() for image in range(2)] == seats


def test_the_order_of_queries_and_of_targets_changes_nothing(fixed_points):
    class_logits, mask_logits, mask_labels, class_labels = make_batch()
    queries = torch.randperm(NUM_QUERIES, generator=torch.Generator().manual_seed(2))
    before = make_criterion()(class_logits, mask_logits, mask_labels, class_labels)
    after = make_criterion()(
        [logits[:, queries] for logits in class_logits],
        [logits[:, queries] for logits in mask_logits],
        [masks.flip(0) for masks in mask_labels],
        [labels.flip(0) for labels in class_labels],
    )
    for name, loss in before.items():
        torch.testing.assert_close(after[name], loss, rtol=1e-5, atol=1e-5)


def test_every_query_learns_its_class_and_only_matched_queries_learn_a_mask():
    class_logits, mask_logits, mask_labels, class_labels = make_batch(counts=(3, 2), num_layers=2)
    sum(make_criterion()(class_logits, mask_logits, mask_labels, class_labels).values()).backward()
    for classes, masks in zip(class_logits, mask_logits, strict=True):
        assert (classes.grad.abs().sum(-1) > 0).all()
        assert (masks.grad.abs().sum((-1, -2)) > 0).sum(1).tolist() == [3, 2]


def test_a_batch_without_masks_pays_for_classes_only_and_still_has_gradients():
    batch = make_batch(counts=(0, 0), num_layers=1)
    losses = make_criterion()(*batch)
    sum(losses.values()).backward()
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0.0
    assert losses["loss_ce"].item() > 0 and batch[0][0].grad.abs().sum() > 0
    assert batch[1][0].grad is not None


def test_more_masks_than_queries_leave_the_dearest_masks_unmatched(fixed_points):
    class_logits, mask_logits, mask_labels, class_labels = make_batch(counts=(9, 1), num_queries=4)
    mask_labels[0] = torch.rand(9, 9, 11, generator=torch.Generator().manual_seed(3)) > 0.5
    with torch.no_grad():
        mask_logits[1][0] = 8.0 * mask_labels[0][2:6] - 4.0
    criterion = make_criterion(class_weight=0.0)
    matches = criterion.match(class_logits, mask_logits, mask_labels, class_labels)
    assert [side[1].tolist() for side in matches.of(0)] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert matches.sizes == [4, 1] and matches.of(1)[1].tolist() == [[0]] * 3
    losses = criterion(class_logits, mask_logits, mask_labels, class_labels)
    # Those four masks alone cost the same, but for the number of masks that the loss is divided by.
    four = [mask_labels[0][2:6], mask_labels[1]], [class_labels[0][2:6], class_labels[1]]
    expected = criterion(class_logits, mask_logits, *four)
    assert 10 * losses["loss_mask_1"].item() == pytest.approx(5 * expected["loss_mask_1"].item())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_numbers_are_matched_last(value):
    class_logits, mask_logits, mask_labels, class_labels = make_batch(num_layers=1)
    with torch.no_grad():
        mask_logits[0][0, 1] = value
        mask_logits[0][1] = math.nan
    matches = make_criterion().match(class_logits, mask_logits, mask_labels, class_labels)
    assert 1 not in matches.of(0)[0][0].tolist()
    assert len(set(matches.of(1)[0][0].tolist())) == 2


def test_a_loss_over_predictions_that_are_not_numbers_is_not_a_number():
    batch = make_batch(num_layers=2)
    with torch.no_grad():
        batch[1][0][1] = math.nan
    losses = make_criterion()(*batch)
    assert losses["loss_mask_0"].isnan() and losses["loss_dice_0"].isnan()
    assert torch.isfinite(losses["loss_mask"]) and torch.isfinite(losses["loss_ce_0"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float16])
def test_masks_of_any_type_mean_the_same(fixed_points, dtype):
    class_logits, mask_logits, mask_labels, class_labels = make_batch()
    expected = make_criterion()(class_logits, mask_logits, mask_labels, class_labels)
    masks = [masks.to(dtype) for masks in mask_labels]
    losses = make_criterion()(class_logits, mask_logits, masks, class_labels)
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())


def test_images_may_have_labels_of_different_sizes(fixed_points):
    class_logits, mask_logits, mask_labels, class_labels = make_batch()
    larger = [mask_labels[0], mask_labels[1].repeat_interleave(2, 1).repeat_interleave(2, 2)]
    matches = make_criterion().match(class_logits, mask_logits, larger, class_labels)
    assert matches.sizes == [3, 2]
    losses = make_criterion()(class_logits, mask_logits, larger, class_labels)
    assert all(torch.isfinite(loss) for loss in losses.values())


class SizesAndReadings(TorchDispatchMode):
    """Remembers the size of the largest tensor made, and what read a tensor's values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.readings: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.readings.append(func.overloadpacket.__name__)
        return result


def test_a_step_crosses_to_the_host_once(monkeypatch):
    crossings = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: crossings.append(tensor.numel()) or original(tensor)
    )
    batch = make_batch(counts=(3, 0, 2), num_layers=4)
    with SizesAndReadings() as seen:
        make_criterion()(*batch)
    assert crossings == [4 * NUM_QUERIES * (3 + 2)]
    assert seen.readings == []


def test_nothing_as_large_as_all_queries_times_all_masks_times_points_is_ever_made():
    batch = make_batch(counts=(20, 20), num_queries=50)
    with SizesAndReadings() as seen:
        make_criterion(train_num_points=500)(*batch)
    read_by_queries, candidates = 50 * 500, 2 * 40 * 3 * 500
    assert seen.largest == max(read_by_queries, candidates) < 50 * 20 * 500


def make_groups(signs=(1,)):
    """Two groups, of images 0 and 2 and of the smaller image 1, that has a query less."""
    generator = torch.Generator().manual_seed(7)
    parts, groups = [], []
    for indices, size, queries in (([0, 2], (16, 12), 6), ([1], (8, 12), 5)):
        embeds = torch.randn(len(indices), queries, 4, generator=generator).requires_grad_()
        features = torch.randn(len(indices), 4, *size, generator=generator).requires_grad_()
        own = [sign * embeds for sign in signs]
        masks = [torch.einsum("bqc,bchw->bqhw", one, features) for one in own]
        classes = [torch.zeros(len(indices), queries, 2)] * len(signs)
        parts.append(SegmentOutput(classes, masks, mask_embeds=own, mask_features=features))
        groups.append(SimpleNamespace(indices=indices))
    leaves = [tensor for part in parts for tensor in (part.mask_embeds[0], part.mask_features)]
    return parts, groups, leaves


def test_masks_computed_again_are_the_merged_ones():
    parts, groups, _ = make_groups(signs=(1, -1))
    queries = [torch.tensor([[4, 1], [0, 2]]), torch.tensor([[5, 0, 2], [1, 5, 4]]), torch.zeros(2, 0).long()]
    matches = SimpleNamespace(of=lambda image: (queries[image], None))
    masks = matched_mask_logits(parts, groups, (64, 48))(matches)
    merged = merge(parts, groups, (64, 48)).mask_logits
    for index in range(2):
        expected = torch.cat([image[own[index]] for image, own in zip(merged[index], queries, strict=True)])
        torch.testing.assert_close(masks[index], expected)


def test_masks_computed_again_give_the_same_losses_and_gradients_and_spare_the_large_gradient(fixed_points):
    parts, groups, leaves = make_groups()
    class_logits, _, mask_labels, class_labels = make_batch(counts=(3, 6, 0), num_layers=1, num_queries=6)
    gradients, losses = {}, {}
    for again in (False, True):
        mask_logits = merge(parts, groups, (64, 48)).mask_logits
        mask_logits[0].retain_grad()
        matched = matched_mask_logits(parts, groups, (64, 48)) if again else None
        values = make_criterion()(class_logits, mask_logits, mask_labels, class_labels, matched)
        losses[again] = torch.stack(list(values.values()))
        gradients[again] = torch.autograd.grad(losses[again].sum(), leaves, retain_graph=True)
        losses[again].sum().backward(retain_graph=True)
        assert (mask_logits[0].grad is None) == again
    torch.testing.assert_close(losses[True], losses[False])
    for ours, expected in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_this_code_loads_without_scipy():
    assert "scipy" not in get_imports(set_criterion.__file__)


def test_without_scipy_training_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        make_criterion()(*make_batch())


def test_half_precision_predictions_are_scored_in_single_precision(fixed_points):
    class_logits, mask_logits, mask_labels, class_labels = make_batch()
    halves = [[x.detach().bfloat16() for x in logits] for logits in (class_logits, mask_logits)]
    singles = [[x.float() for x in logits] for logits in halves]
    expected = make_criterion()(*singles, mask_labels, class_labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = make_criterion()(*halves, mask_labels, class_labels)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


def test_uncertain_points_lie_nearer_to_the_border_than_random_ones():
    column = torch.linspace(-10, 10, 32).expand(2, 32, 32).contiguous()
    points = make_criterion(train_num_points=400).uncertain_points(column)
    doubt = sample_at_points(column, points).abs()
    assert points.shape == (2, 400, 2)
    assert doubt[:, :300].mean() < 0.6 * doubt[:, 300:].mean()


def test_lists_that_do_not_fit_each_other_are_refused():
    class_logits, mask_logits, mask_labels, class_labels = make_batch()
    criterion = make_criterion()
    with pytest.raises(ValueError, match="2 images"):
        criterion(class_logits, mask_logits, mask_labels[:1], class_labels[:1])
    with pytest.raises(ValueError, match="pair"):
        criterion(class_logits[:1], mask_logits, mask_labels, class_labels)
    with pytest.raises(ValueError, match="one class label per mask"):
        criterion(class_logits, mask_logits, mask_labels, class_labels[::-1])
