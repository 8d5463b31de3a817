"""The Triton kernel of deformable attention does what the PyTorch path does; without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_ita.deformable_attention import (
    SamplingGrid,
    sample_by_grid_sample,
    sample_by_triton,
    triton,
    triton_supports,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this when a kernel is defined, so the tests below run in a process of their own."""
needs_triton = pytest.mark.skipif(not triton is not None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within the test of the interpreter")
SHAPES = [(2, 3), (3, 4)]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_kernel_passes_its_tests_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def inputs(spread=2.0, heads=2, channels=6, points=2, batch=1):
    random = torch.Generator().manual_seed(0)
    plan = SamplingGrid.of(SHAPES, torch.device("cpu"))
    cells = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, cells, heads * channels, generator=random)
    offsets = torch.randn(batch, cells, heads, len(SHAPES), points, 2, generator=random) * spread
    weights = torch.randn(batch, cells, heads, len(SHAPES) * points, generator=random).softmax(-1)
    return value, offsets, weights, plan


@interpreted
def test_the_kernel_is_run_here():
    assert triton_supports(torch.zeros(1))


@interpreted
@pytest.mark.parametrize("spread", [0.0, 2.0, 1e9])
def test_the_kernel_samples_what_grid_sample_samples(spread):
    arguments = inputs(spread)
    torch.testing.assert_close(
        sample_by_triton(*arguments), sample_by_grid_sample(*arguments), rtol=1e-4, atol=1e-5
    )


@interpreted
def test_the_kernel_has_the_gradients_of_grid_sample():
    gradients = []
    for sample in (sample_by_triton, sample_by_grid_sample):
        *tensors, plan = inputs()
        tensors = [tensor.requires_grad_() for tensor in tensors]
        sample(*tensors, plan).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    value, offsets, weights, plan = inputs()
    value = value.to(dtype).requires_grad_()
    found = sample_by_triton(value, offsets, weights, plan)
    assert found.dtype == torch.float32
    expected = sample_by_grid_sample(value.detach().float(), offsets, weights, plan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert value.grad.dtype == dtype


@interpreted
def test_a_place_that_is_no_number_gives_no_number_and_nothing_else():
    value, offsets, weights, plan = inputs()
    expected = sample_by_triton(value, offsets, weights, plan)
    offsets[0, 4, 0, 0, 0, 0] = float("nan")
    found = sample_by_triton(value, offsets, weights, plan)
    assert found[0, 4, :6].isnan().all()
    found[0, 4, :6] = expected[0, 4, :6]
    assert torch.equal(found, expected)


@interpreted
def test_compiled_graphs_take_the_kernel_as_one_operator():
    value, offsets, weights, plan = inputs()
    seen = []

    def backend(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(sample_by_triton, backend=backend, fullgraph=True)
    found = compiled(value, offsets, weights, plan)
    torch.testing.assert_close(found, sample_by_triton(value, offsets, weights, plan))
    assert "ita.deformable_attention.default" in seen or any("deformable_attention" in name for name in seen)


@interpreted
def test_the_operator_is_registered_as_torch_wants_it():
    value, offsets, weights, plan = inputs(batch=1)
    arguments = (
        value.unflatten(-1, (2, -1)).requires_grad_(),
        offsets.requires_grad_(),
        weights.unflatten(-1, (2, 2)).detach().requires_grad_(),
        plan.points_in_cells,
        plan.levels,
    )
    torch.library.opcheck(torch.ops.ita.deformable_attention.default, arguments)
