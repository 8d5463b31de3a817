"""The samplers of deformable attention compute what `grid_sample` does: one for CPUs, and a Triton kernel for GPUs.

Without a GPU the kernel runs in Triton's interpreter, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_ita.deformable_attention import (
    SamplingGrid,
    sample_by_embedding_bag,
    sample_by_grid_sample,
    sample_by_triton,
    triton,
    triton_supports,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this when a kernel is defined."""
SAMPLERS = [sample_by_triton] if INTERPRETED else [sample_by_embedding_bag]
SHAPES = [(2, 3), (3, 4)] if INTERPRETED else [(3, 5), (6, 9), (12, 18)]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within the test of the interpreter")


@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_kernel_passes_its_tests_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


def inputs(spread=2.0, batch=1, heads=2, points=2, channels=12):
    random = torch.Generator().manual_seed(0)
    sampling_grid = SamplingGrid.of(SHAPES, torch.device("cpu"))
    cells = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, cells, channels, generator=random)
    offsets = torch.randn(batch, cells, heads, len(SHAPES), points, 2, generator=random) * spread
    weights = torch.randn(batch, cells, heads, len(SHAPES) * points, generator=random).softmax(-1)
    return value, offsets, weights, sampling_grid


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("spread", [0.0, 2.0, 1e9])
def test_it_samples_what_grid_sample_samples(sample, spread):
    arguments = inputs(spread, batch=1 if INTERPRETED else 2)
    torch.testing.assert_close(sample(*arguments), sample_by_grid_sample(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_it_has_the_gradients_of_grid_sample(sample):
    gradients = []
    for one in (sample, sample_by_grid_sample):
        *tensors, sampling_grid = inputs()
        tensors = [tensor.requires_grad_() for tensor in tensors]
        one(*tensors, sampling_grid).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("channels", "training", "fits"), [(64, True, True), (32, True, False), (32, False, True)]
)
def test_training_with_narrow_heads_leaves_the_table_of_cells_to_inference(channels, training, fits):
    value, _, _, sampling_grid = inputs(channels=channels)
    assert sampling_grid.fits_embedding_bag(value.requires_grad_(training), heads=2) == fits


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_position_that_is_nan_gives_nan_there_and_nowhere_else(sample):
    value, offsets, weights, sampling_grid = inputs()
    expected = sample(value, offsets, weights, sampling_grid)
    offsets[0, 4, 0, 0, 0, 0] = float("nan")
    found = sample(value, offsets, weights, sampling_grid)
    assert found[0, 4, :6].isnan().all()
    found[0, 4, :6] = expected[0, 4, :6]
    assert torch.equal(found, expected)


@interpreted
def test_the_kernel_is_run_here():
    assert triton_supports(torch.zeros(1))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    value, offsets, weights, sampling_grid = inputs()
    value = value.to(dtype).requires_grad_()
    found = sample_by_triton(value, offsets, weights, sampling_grid)
    assert found.dtype == torch.float32
    expected = sample_by_grid_sample(value.detach().float(), offsets, weights, sampling_grid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert value.grad.dtype == dtype


@interpreted
def test_compiled_graphs_take_the_kernel_as_one_operator():
    arguments, seen = inputs(), []

    def backend(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(sample_by_triton, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), sample_by_triton(*arguments))
    assert any("deformable_attention" in name for name in seen)


@interpreted
def test_the_operator_is_registered_as_torch_wants_it():
    value, offsets, weights, sampling_grid = inputs()
    arguments = (
        value.unflatten(-1, (2, -1)).requires_grad_(),
        offsets.requires_grad_(),
        weights.unflatten(-1, (2, 2)).detach().requires_grad_(),
        sampling_grid.points_in_cells,
        sampling_grid.levels,
    )
    torch.library.opcheck(torch.ops.ita.deformable_attention.default, arguments)
