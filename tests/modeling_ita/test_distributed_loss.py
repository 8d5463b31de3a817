"""Two processes that share a batch learn what one process learns from all of it."""

import socket

import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from helpers.tiny_checkpoint import CLASSES, tiny_config
from modeling_ita import ITAForOpenVocabSegmentation, set_criterion

COUNTS = (3, 1, 0, 2)  # masks of each image; the first two images are the first process's
POINTS = 48


def make_batch() -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(len(COUNTS), 3, 64, 64, generator=generator),
        "mask_labels": [torch.rand(n, 64, 64, generator=generator) > 0.5 for n in COUNTS],
        "class_labels": [torch.randint(len(CLASSES), (n,), generator=generator) for n in COUNTS],
    }


def same_points(num_masks: int, count: int, device: torch.device | str) -> torch.Tensor:
    table = torch.rand(3 * POINTS, 2, generator=torch.Generator().manual_seed(5))
    return table[:count].expand(num_masks, -1, -1).clone()


def train_step(images: slice, distributed: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of some images and the gradients that they leave, by name."""
    set_criterion.draw_points = same_points
    torch.manual_seed(0)
    model = ITAForOpenVocabSegmentation(tiny_config(train_num_points=POINTS)).train()
    batch = {name: values[images] for name, values in make_batch().items()}
    learner = DistributedDataParallel(model) if distributed else model
    outputs = learner(**batch)
    outputs.loss.backward()
    losses = {name: loss.detach() for name, loss in outputs.loss_dict.items()}
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run_process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(train_step(slice(2 * rank, 2 * rank + 2), distributed=True), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("processes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (port, folder), nprocs=2)
    original = set_criterion.draw_points
    try:
        whole = train_step(slice(None), distributed=False)
    finally:
        set_criterion.draw_points = original
    return whole, [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def test_the_mean_of_their_losses_is_the_loss_of_the_whole_batch(one_and_two):
    (losses, _), halves = one_and_two
    for name, loss in losses.items():
        mean = (halves[0][0][name] + halves[1][0][name]) / 2
        assert mean.item() == pytest.approx(loss.item(), rel=1e-5), name


def test_both_hold_the_gradients_of_the_whole_batch(one_and_two):
    (_, gradients), halves = one_and_two
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for _, half in halves:
        assert half.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(half[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_a_process_whose_images_have_few_masks_pays_less(one_and_two):
    _, ((losses, _), (others, _)) = one_and_two
    # Four masks against two, of the same random kind.
    assert losses["loss_dice"].item() == pytest.approx(2 * others["loss_dice"].item(), rel=0.2)
