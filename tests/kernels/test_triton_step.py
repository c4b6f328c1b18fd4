"""The Triton norms, activation, rotary and attention compute what their references do.

On a machine without a GPU they run through Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from nybble.kernels import reference
from torch import Tensor

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from nybble.kernels.triton import norm, rotary  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Relative error of the whole and no stray element; NaN never passes."""
    if tolerance is None:
        # The interpreter truncates to bfloat16 where the GPU rounds.
        tolerance = 1e-2 if found.dtype == torch.bfloat16 else 5e-4
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"relative error {error}"


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 5120), (3, 96), (7, 128), (33, 64), (2, 1000)])
def test_rms_norm_equals_the_reference(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype)
    close(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@dtypes
def test_adding_the_residual_rounds_as_the_reference_does(dtype: torch.dtype) -> None:
    x, residual = random(5, 200, dtype=dtype), random(5, 200, dtype=dtype, seed=1)
    weight = random(200, dtype=dtype)
    normed, total = norm.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    if dtype == torch.float16 or DEVICE == "cuda":
        assert torch.equal(total, expected_total)
    close(total, expected_total)
    close(normed, expected)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (3, 1500), (2, 33)])
def test_silu_mul_equals_the_reference(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = 4 * random(rows, 2 * width, dtype=dtype)
    close(norm.silu_mul(gate_up), reference.silu_mul(gate_up))


@dtypes
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(4, 2, 64), (9, 9, 128), (3, 1, 80)])
def test_rotary_store_equals_the_reference_and_touches_nothing_else(
    dtype: torch.dtype, q_heads: int, kv_heads: int, dim: int
) -> None:
    tokens, block_size = 5, 4
    fused = random(tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
    angle = random(tokens, dim)
    slots = torch.tensor([9, -1, 0, 15, 2], device=DEVICE)
    results = []
    for function in (reference.rotary_store, rotary.rotary_store):
        q, k, v = fused.clone().split([q_heads, kv_heads, kv_heads], dim=1)
        caches = torch.full((2, 4, kv_heads, block_size, dim), 7.0, dtype=dtype, device=DEVICE)
        function(q, k, v, angle.cos(), angle.sin(), caches[0], caches[1], slots)
        results.append((q, k, v, caches))
    for expected, found in zip(*results, strict=True):
        close(found, expected)
    assert torch.equal(results[0][3] == 7, results[1][3] == 7)
