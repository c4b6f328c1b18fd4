"""Low-rank additions: each row gets its own adapter's, and nothing from its neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.backend import backend_for
from nybble.kernels.cpu.build import ARM_TARGETS, TARGETS
from nybble.kernels.lora import slot_buffers
from nybble.kernels.lora_batch import LoRABatch

from .cpu_kernels import compiled


@pytest.fixture(
    scope="module",
    params=["reference", *TARGETS, *ARM_TARGETS],
    ids=lambda p: getattr(p, "name", p),
)
def kernel(request: pytest.FixtureRequest) -> Callable[..., None]:
    """The reference, and the kernels compiled for each target this machine runs."""
    if request.param == "reference":
        return reference.lora_add
    return compiled(request.param).lora_add


def random_slots(
    count: int, max_rank: int, inputs: int, offsets: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of different ranks, the first of rank 0; padding is zero."""
    a, b = slot_buffers(count, max_rank, inputs, offsets, dtype, "cpu")
    ranks = torch.zeros(count, dtype=torch.int32)
    for slot in range(count):
        rank = int(torch.randint(1, max_rank + 1, ())) if slot else 0
        ranks[slot] = rank
        for part in range(len(offsets) - 1):
            section = a[slot, part * max_rank : part * max_rank + rank]
            section.copy_(torch.randn(section.shape) * inputs**-0.5)
        b[slot, :, :rank] = torch.randn(offsets[-1], rank).to(dtype)
    return a, b, ranks


def exactly(
    out: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: tuple[int, ...], slots: list[int]
) -> Tensor:
    """What the definition says, row by row in float64, without the rounding of h."""
    result = out.double().clone()
    max_rank = b.shape[2]
    for row, slot in enumerate(slots):
        for part in range(len(offsets) - 1 if slot >= 0 else 0):
            start, end = offsets[part : part + 2]
            h = a[slot, part * max_rank : (part + 1) * max_rank].double() @ x[row].double()
            result[row, start:end] += b[slot, start:end].double() @ h
    return result


def test_a_batch_groups_rows_by_slot_and_leaves_base_rows_out() -> None:
    batch = LoRABatch.of([2, -1, 0, 2, -1, 2], "cpu")
    assert batch is not None
    assert batch.slots.tolist() == [2, -1, 0, 2, -1, 2]
    assert batch.order.tolist() == [2, 0, 3, 5]
    assert batch.segment_starts.tolist() == [0, 1, 4]
    assert batch.segment_slots.tolist() == [0, 2]
    assert batch.max_segment == 3


def test_a_step_without_adapters_has_no_batch() -> None:
    assert LoRABatch.of([-1, -1], "cpu") is None


@given(
    slots=st.lists(st.integers(-1, 3), min_size=1, max_size=24),
    max_rank=st.sampled_from([1, 3, 8, 16, 40]),
    inputs=st.integers(1, 130),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_row_gets_its_adapter(
    kernel: Callable[..., None],
    slots: list[int],
    max_rank: int,
    inputs: int,
    widths: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dtype = torch.bfloat16
    offsets = tuple(sum(widths[:part]) for part in range(len(widths) + 1))
    a, b, ranks = random_slots(4, max_rank, inputs, offsets, dtype)
    x = torch.randn(len(slots), inputs).to(dtype)
    out = torch.randn(len(slots), offsets[-1]).to(dtype)
    expected = exactly(out, x, a, b, offsets, slots)
    before = out.clone()
    batch = LoRABatch.of(slots, "cpu")
    if batch is None:
        return
    kernel(out, x, a, b, ranks, offsets, batch)
    # h and the result are each rounded once; h's error reaches the result through b.
    eps = torch.finfo(dtype).eps
    h_size = (x.double().abs() @ a.double().abs().amax((0, 1))).max()
    bound = eps * (expected.abs() + 4 + max_rank * h_size * b.double().abs().max())
    assert ((out.double() - expected).abs() <= bound).all()
    untouched = [row for row, slot in enumerate(slots) if slot <= 0]
    assert torch.equal(out[untouched], before[untouched])


def test_a_row_does_not_depend_on_its_batch(kernel: Callable[..., None]) -> None:
    torch.manual_seed(0)
    offsets = (0, 96, 130, 164)
    a, b, ranks = random_slots(4, 16, 96, offsets, torch.bfloat16)
    slots = [row % 5 - 1 for row in range(43)]
    x, out = torch.randn(43, 96).bfloat16(), torch.randn(43, 164).bfloat16()
    together = out.clone()
    batch = LoRABatch.of(slots, "cpu")
    assert batch is not None
    kernel(together, x, a, b, ranks, offsets, batch)
    for row, slot in enumerate(slots):
        alone = out[row : row + 1].clone()
        one = LoRABatch.of([slot], "cpu")
        if one is not None:
            kernel(alone, x[row : row + 1], a, b, ranks, offsets, one)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("name", "make", "shown"),
    [
        ("x", lambda x: x[:, :20], "x: torch.bfloat16 (2, 20)"),
        ("out", lambda x: x[:1], "out: torch.bfloat16 (1, 57)"),
        ("b", lambda x: x.contiguous(), "strides (342, 6, 1)"),
        ("ranks", lambda x: x.long(), "ranks: torch.int64"),
    ],
)
@pytest.mark.parametrize("kernel", TARGETS, ids=lambda target: target.name, indirect=True)
def test_what_the_kernel_would_misread_is_refused(
    kernel: Callable[..., None], name: str, make: Callable[[Tensor], Tensor], shown: str
) -> None:
    offsets = (0, 40, 57)
    a, b, ranks = random_slots(3, 6, 30, offsets, torch.bfloat16)
    x, out = torch.randn(2, 30).bfloat16(), torch.randn(2, 57).bfloat16()
    given = {"x": x, "out": out, "a": a, "b": b, "ranks": ranks}
    batch = LoRABatch.of([2, 1], "cpu")
    kernel(**given, offsets=offsets, batch=batch)
    given[name] = make(given[name])
    with pytest.raises(ValueError, match=re.escape(shown)):
        kernel(**given, offsets=offsets, batch=batch)


def test_a_batch_of_rows_is_what_it_says() -> None:
    batch = LoRABatch.of([0, 1, 1], "cpu")
    assert batch is not None
    with pytest.raises(ValueError, match=r"order is torch.int64"):
        replace(batch, order=batch.order.long())
    with pytest.raises(ValueError, match="expected contiguous int32"):
        replace(batch, segment_starts=batch.segment_starts[:2])


def test_other_dtypes_are_computed_without_the_kernel() -> None:
    torch.manual_seed(0)
    offsets = (0, 40, 57)
    a, b, ranks = random_slots(3, 6, 30, offsets, torch.float32)
    slots = [2, 1, -1, 2]
    x, out = torch.randn(4, 30), torch.randn(4, 57)
    expected = exactly(out, x, a, b, offsets, slots)
    batch = LoRABatch.of(slots, "cpu")
    assert batch is not None
    cpu = backend_for(torch.device("cpu"), torch.float32)
    cpu.lora_add(out, x, a, b, ranks, offsets, batch)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
