"""Layers with states: the kernels against their references, and chunks against whole prompts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nybble.kernels import recurrent
from nybble.kernels.backend import Backend
from nybble.kernels.state_batch import StateBatch

TAPS, CHANNELS, SLOTS = 4, 48, 6
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 16, 80


def batch(
    lengths: list[int],
    read: list[int],
    write: list[int],
    snapshot: list[int] | None = None,
    rows: list[int] | None = None,
) -> StateBatch:
    def of(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    none = [-1] * len(lengths)
    return StateBatch(
        of(starts), of(read), of(write), of(snapshot or none), of(rows or lengths), max(lengths)
    )


def convolution_inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, CHANNELS, generator=generator).to(dtype)
    weight = torch.randn(TAPS, CHANNELS, generator=generator)
    return x, weight, torch.randn(CHANNELS, generator=generator)


def convolution_state(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SLOTS, TAPS - 1, CHANNELS, generator=generator).to(dtype)


def delta_inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator)

    q, k = random(KEY_HEADS, KEY_DIM).to(dtype), random(KEY_HEADS, KEY_DIM).to(dtype)
    v = random(VALUE_HEADS, VALUE_DIM).to(dtype)
    return q, k, v, -random(VALUE_HEADS).exp(), random(VALUE_HEADS).sigmoid()


def delta_state() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SLOTS, VALUE_HEADS, KEY_DIM, VALUE_DIM, generator=generator)


def scan_inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator)

    x, b, c = random(VALUE_HEADS, VALUE_DIM), random(KEY_HEADS, KEY_DIM), random(KEY_HEADS, KEY_DIM)
    dt = random(VALUE_HEADS).exp()
    return x.to(dtype), b.to(dtype), c.to(dtype), dt, -dt * random(VALUE_HEADS).sigmoid()


def scan_state() -> Tensor:
    return delta_state()


# (heads, key groups, state dim, head dim); a few heads of each group.
PUBLISHED = {
    "Granite 4, Bamba": (4, 1, 128, 64),
    "Falcon-H1": (4, 2, 256, 64),
    "Falcon-H1 34B": (2, 2, 256, 128),
    "Nemotron-H": (8, 4, 128, 64),
}
# A decode, a prompt's beginning with a snapshot within it, one that goes on from another slot and
# keeps its own end, a short one, and padding, which keeps nothing.
MIXED = batch(
    [1, 9, 7, 2, 1], [0, -1, 5, 2, -1], [0, 1, 3, 2, -1], [-1, 4, -1, -1, -1], [1, 6, 7, 2, 1]
)
TOKENS = 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_the_convolution_is_that_of_torch(dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = convolution_inputs(30, dtype)
    state = convolution_state(dtype)
    found = recurrent.short_convolution(
        x, weight, bias if biased else None, state, batch([30], [-1], [2])
    )
    expected = torch.nn.functional.conv1d(
        x.float().T[None],
        weight.T[:, None],
        bias if biased else None,
        padding=TAPS - 1,
        groups=CHANNELS,
    )[0, :, :30].T
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2, atol=1e-5)
    assert torch.equal(state[2], x[-TAPS + 1 :])


def test_the_delta_rule_is_that_of_transformers() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    inputs, state = delta_inputs(70, torch.float32), delta_state()
    before = state[1:2].clone()
    expected, last = theirs.torch_chunk_gated_delta_rule(
        *(each[None] for each in inputs),
        initial_state=before,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    found = recurrent.gated_delta_rule(*inputs, state, batch([70], [1], [3]))
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[3], last[0], rtol=1e-4, atol=1e-5)


def test_the_state_space_is_that_of_transformers() -> None:
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as theirs

    (x, b, c, dt, _), state = scan_inputs(70, torch.float32), scan_state()
    a = -torch.rand(VALUE_HEADS, generator=torch.Generator().manual_seed(0))
    expected, last = theirs.mamba2_chunk_scan(
        *(each[None] for each in (x, dt)),
        a,
        *(each[None] for each in (b, c)),
        chunk_size=16,
        initial_states=state[1:2].mT.contiguous(),
        return_final_states=True,
        dt_limit=(0.0, float("inf")),
        dt_softplus=False,
    )
    found = recurrent.state_space_scan(x, b, c, dt, dt * a, state, batch([70], [1], [3]))
    torch.testing.assert_close(found, expected[0].view(found.shape), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state[3], last[0].mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strided", [False, True])
def test_the_cpu_convolution_is_its_reference_to_the_bit(
    cpu: Backend, dtype: torch.dtype, strided: bool
) -> None:
    x, weight, bias = convolution_inputs(TOKENS, dtype)
    if strided:
        x = torch.cat((x, x), dim=1)[:, :CHANNELS]
    expected_state, state = convolution_state(dtype), convolution_state(dtype)
    expected = recurrent.short_convolution(x, weight, bias, expected_state, MIXED)
    assert torch.equal(cpu.short_convolution(x, weight, bias, state, MIXED), expected)
    assert torch.equal(state, expected_state)
    assert not torch.equal(state[4], convolution_state(dtype)[4]), "no snapshot was kept"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cpu_scan_is_its_reference(cpu: Backend, dtype: torch.dtype) -> None:
    inputs = scan_inputs(TOKENS, dtype)
    expected_state, state = scan_state(), scan_state()
    expected = recurrent.state_space_scan(*inputs, expected_state, MIXED)
    found = cpu.state_space_scan(*inputs, state, MIXED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
    assert not torch.equal(state[4], scan_state()[4]), "no snapshot was kept"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cpu_delta_rule_is_its_reference(cpu: Backend, dtype: torch.dtype) -> None:
    inputs = delta_inputs(TOKENS, dtype)
    expected_state, state = delta_state(), delta_state()
    expected = recurrent.gated_delta_rule(*inputs, expected_state, MIXED)
    found = cpu.gated_delta_rule(*inputs, state, MIXED)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
    assert not torch.equal(state[4], delta_state()[4]), "no snapshot was kept"


@pytest.mark.parametrize("cuts", [[1, 2, 3], [5], [19], list(range(1, 20))])
def test_chunks_give_the_bits_of_the_whole(cpu: Backend, cuts: list[int]) -> None:
    x, weight, bias = convolution_inputs(TOKENS, torch.bfloat16)
    inputs, scanned = delta_inputs(TOKENS, torch.bfloat16), scan_inputs(TOKENS, torch.bfloat16)
    for backend in (recurrent, cpu):
        small, large, spaces = convolution_state(torch.bfloat16), delta_state(), scan_state()
        whole = batch([TOKENS], [-1], [0])
        convolved = backend.short_convolution(x, weight, bias, small, whole)
        attended = backend.gated_delta_rule(*inputs, large, whole)
        read = backend.state_space_scan(*scanned, spaces, whole)
        for start, stop in pairwise([0, *cuts, TOKENS]):
            chunk = batch([stop - start], [1 if start else -1], [1])
            rows = slice(start, stop)
            part = backend.short_convolution(x[rows], weight, bias, small, chunk)
            assert torch.equal(part, convolved[rows])
            part = backend.gated_delta_rule(*(each[rows] for each in inputs), large, chunk)
            assert torch.equal(part, attended[rows])
            part = backend.state_space_scan(*(each[rows] for each in scanned), spaces, chunk)
            assert torch.equal(part, read[rows])
        assert torch.equal(small[1], small[0])
        assert torch.equal(large[1], large[0])
        assert torch.equal(spaces[1], spaces[0])


def test_tensors_that_the_kernels_would_misread_are_refused(cpu: Backend) -> None:
    x, weight, bias = convolution_inputs(TOKENS, torch.bfloat16)
    with pytest.raises(ValueError, match="the CPU kernels take x"):
        cpu.short_convolution(x, weight, bias, convolution_state(torch.float32), MIXED)
    with pytest.raises(ValueError, match="contiguous float32 state"):
        cpu.gated_delta_rule(*delta_inputs(TOKENS, torch.bfloat16), delta_state()[:, :2], MIXED)
    with pytest.raises(ValueError, match="contiguous float32 state"):
        cpu.state_space_scan(*scan_inputs(TOKENS, torch.bfloat16), scan_state()[:, :2], MIXED)
    with pytest.raises(ValueError, match=r"snapshot_rows is torch\.int64"):
        StateBatch(
            MIXED.query_start, MIXED.read, MIXED.write, MIXED.snapshot, torch.ones(5).long(), 9
        )


@pytest.fixture(scope="module")
def triton() -> Backend:
    pytest.importorskip("triton", reason="Triton is for Linux")
    from nybble.kernels.triton import backend

    return backend


@pytest.mark.parametrize("biased", [False, True])
def test_the_gpu_convolution_is_its_reference(triton: Backend, biased: bool) -> None:
    x, weight, bias = convolution_inputs(TOKENS, torch.bfloat16)
    x = torch.cat((x, x), dim=1)[:, :CHANNELS]
    expected_state, state = convolution_state(torch.bfloat16), convolution_state(torch.bfloat16)
    added = bias if biased else None
    expected = recurrent.short_convolution(x, weight, added, expected_state, MIXED)
    found = triton.short_convolution(x, weight, added, state, MIXED)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_the_gpu_delta_rule_is_its_reference(triton: Backend, dtype: torch.dtype) -> None:
    inputs = delta_inputs(TOKENS, dtype)
    expected_state, state = delta_state(), delta_state()
    expected = recurrent.gated_delta_rule(*inputs, expected_state, MIXED)
    found = triton.gated_delta_rule(*inputs, state, MIXED)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_the_gpu_scan_is_its_reference(triton: Backend, dtype: torch.dtype) -> None:
    inputs = scan_inputs(TOKENS, dtype)
    expected_state, state = scan_state(), scan_state()
    expected = recurrent.state_space_scan(*inputs, expected_state, MIXED)
    found = triton.state_space_scan(*inputs, state, MIXED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
    assert not torch.equal(state[4], scan_state()[4]), "no snapshot was kept"


# Two prompts in chunks, one with a border that ends no chunk, beside a decode and a short prompt.
LONG = batch(
    [70, 1, 100, 31, 32], [-1, 0, 5, -1, 2], [1, 0, 3, 2, -1], [4, -1, -1, -1, -1], [45, 1, 1, 1, 1]
)


def test_the_gpu_delta_rule_in_chunks_is_its_reference(triton: Backend) -> None:
    inputs = delta_inputs(234, torch.float32)
    expected_state, state = delta_state(), delta_state()
    expected = recurrent.gated_delta_rule(*inputs, expected_state, LONG)
    found = triton.gated_delta_rule(*inputs, state, LONG)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    assert not torch.equal(state[4], delta_state()[4]), "no snapshot was kept"


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32]
)
def test_the_gpu_scan_in_chunks_is_its_reference(triton: Backend, dtype: torch.dtype) -> None:
    inputs = scan_inputs(234, dtype)
    expected_state, state = scan_state(), scan_state()
    expected = recurrent.state_space_scan(*inputs, expected_state, LONG)
    # As a layer has them: parts of one row.
    values, keys = VALUE_HEADS * VALUE_DIM, KEY_HEADS * KEY_DIM
    mixed = torch.cat([each.flatten(1) for each in inputs[:3]], dim=1)
    x, b, c = mixed.split([values, keys, keys], dim=1)
    found = triton.state_space_scan(
        x.view(-1, VALUE_HEADS, VALUE_DIM),
        b.view(-1, KEY_HEADS, KEY_DIM),
        c.view(-1, KEY_HEADS, KEY_DIM),
        *inputs[3:],
        state,
        LONG,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4)
    assert not torch.equal(state[4], scan_state()[4]), "no snapshot was kept"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "groups", "state_dim", "head_dim"), PUBLISHED.values(), ids=PUBLISHED
)
def test_the_gpu_scan_is_its_reference_at_published_sizes(
    triton: Backend, heads: int, groups: int, state_dim: int, head_dim: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(100, *shape, generator=generator).bfloat16()

    inputs = random(heads, head_dim), random(groups, state_dim), random(groups, state_dim)
    dt = random(heads).float().exp()
    state = torch.randn(3, heads, state_dim, head_dim, generator=generator)
    expected_state = state.clone()
    rows = batch([97, 3], [-1, 0], [1, 0], [2, -1], [64, 1])
    g = -dt * torch.rand(heads, generator=generator)
    expected = recurrent.state_space_scan(*inputs, dt, g, expected_state, rows)
    found = triton.state_space_scan(*inputs, dt, g, state, rows)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state, expected_state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gpu_gated_norm_is_its_reference(
    triton: Backend, dtype: torch.dtype, groups: int
) -> None:
    generator = torch.Generator().manual_seed(groups)
    x, gate = torch.randn(2, 7, 96, generator=generator).unbind(0)
    weight = torch.randn(96, generator=generator).to(dtype)
    gate = torch.cat((gate, gate), dim=1).to(dtype)[:, :96]  # a part of a row
    expected = recurrent.gated_rms_norm(x, gate, weight, groups, 1e-5)
    found = triton.gated_rms_norm(x, gate, weight, groups, 1e-5)
    # The interpreter cuts both roundings off.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-5)
