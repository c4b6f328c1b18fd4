"""Low-rank additions: each row gets its own adapter's, and nothing from its neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.backend import backend_for
from nybble.kernels.cpu.build import ARM_TARGETS, TARGETS
from nybble.kernels.lora import LoRASlots, LowRank, Matrices, in_8_bits
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
) -> LoRASlots:
    """Slots of different ranks, in each part another one; the first slot has nothing.

    dtype: of the matrices; int8 for every second slot in 8 bits, and the others in bfloat16.
    """

    def matrices(slot: int, rank: int, out: int) -> Matrices:
        a, b = torch.randn(rank, inputs) * inputs**-0.5, torch.randn(rank, out)
        if dtype != torch.int8:
            return Matrices(a.to(dtype), b.to(dtype))
        if slot % 2 == 0:
            return Matrices(a.bfloat16(), b.bfloat16())
        (a, of_a), (b, of_b) = in_8_bits(a), in_8_bits(b)
        return Matrices(a, b, torch.stack((of_a, of_b)))

    def part(slot: int, out: int) -> LowRank:
        rank = int(torch.randint(0, max_rank + 1, ()))
        return matrices(slot, rank, out) if rank else None

    widths = [end - start for start, end in pairwise(offsets)]
    adapters = [[part(slot, out) if slot else None for out in widths] for slot in range(count)]
    adapters[-1][0] = matrices(count - 1, max_rank, widths[0])
    used = torch.bfloat16 if dtype == torch.int8 else dtype
    return LoRASlots.of(adapters, inputs, offsets, used)


def exactly(out: Tensor, x: Tensor, slots: LoRASlots, rows: list[int]) -> tuple[Tensor, Tensor]:
    """What the definition says, row by row in float64, without the rounding of h.

    Also how large the terms of each value are, of which h's error is a share.
    """
    result = out.double().clone()
    terms = torch.zeros_like(result)
    for row, slot in enumerate(rows):
        found = slots.matrices[slot] if slot >= 0 else ()
        for pair, (start, end) in zip(found, pairwise(slots.offsets), strict=False):
            if pair is not None:
                a, b = (each.double() for each in pair.wide())
                result[row, start:end] += a @ x[row].double() @ b
                terms[row, start:end] = a.abs() @ x[row].double().abs() @ b.abs()
    return result, terms


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
    stored=st.sampled_from([torch.bfloat16, torch.int8]),
)
@settings(max_examples=60, deadline=None)
def test_every_row_gets_its_adapter(
    kernel: Callable[..., None],
    slots: list[int],
    max_rank: int,
    inputs: int,
    widths: list[int],
    seed: int,
    stored: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    dtype = torch.bfloat16
    offsets = tuple(sum(widths[:part]) for part in range(len(widths) + 1))
    given = random_slots(4, max_rank, inputs, offsets, stored)
    x = torch.randn(len(slots), inputs).to(dtype)
    out = torch.randn(len(slots), offsets[-1]).to(dtype)
    expected, terms = exactly(out, x, given, slots)
    before = out.clone()
    batch = LoRABatch.of(slots, "cpu")
    if batch is None:
        return
    kernel(out, x, given, batch)
    # h and the result are each rounded once; h's error reaches the result through b.
    eps = torch.finfo(dtype).eps
    assert ((out.double() - expected).abs() <= eps * (expected.abs() + terms + 1e-3)).all()
    untouched = [row for row, slot in enumerate(slots) if slot <= 0]
    assert torch.equal(out[untouched], before[untouched])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_a_row_does_not_depend_on_its_batch(
    kernel: Callable[..., None], stored: torch.dtype
) -> None:
    torch.manual_seed(0)
    offsets = (0, 96, 130, 164)
    given = random_slots(4, 16, 96, offsets, stored)
    slots = [row % 5 - 1 for row in range(43)]
    x, out = torch.randn(43, 96).bfloat16(), torch.randn(43, 164).bfloat16()
    together = out.clone()
    batch = LoRABatch.of(slots, "cpu")
    assert batch is not None
    kernel(together, x, given, batch)
    for row, slot in enumerate(slots):
        alone = out[row : row + 1].clone()
        one = LoRABatch.of([slot], "cpu")
        if one is not None:
            kernel(alone, x[row : row + 1], given, one)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("name", "make", "shown"),
    [
        ("x", lambda x: x[:, :20], "x: torch.bfloat16 (2, 20)"),
        ("out", lambda x: x[:1], "out: torch.bfloat16 (1, 57)"),
    ],
)
@pytest.mark.parametrize("kernel", TARGETS, ids=lambda target: target.name, indirect=True)
def test_what_the_kernel_would_misread_is_refused(
    kernel: Callable[..., None], name: str, make: Callable[[Tensor], Tensor], shown: str
) -> None:
    offsets = (0, 40, 57)
    slots = random_slots(3, 6, 30, offsets, torch.bfloat16)
    x, out = torch.randn(2, 30).bfloat16(), torch.randn(2, 57).bfloat16()
    given = {"x": x, "out": out}
    batch = LoRABatch.of([2, 1], "cpu")
    kernel(**given, slots=slots, batch=batch)
    given[name] = make(given[name])
    with pytest.raises(ValueError, match=re.escape(shown)):
        kernel(**given, slots=slots, batch=batch)


@pytest.mark.parametrize(
    ("a", "b", "shown"),
    [
        ((4, 30), (4, 16), "b torch.bfloat16 (4, 16) in slot 1"),
        ((4, 29), (4, 17), "a torch.bfloat16 (4, 29)"),
        ((7, 30), (7, 17), "rank 1 to 6"),
        ((0, 30), (0, 17), "rank 1 to 6"),
        ((4, 30), (3, 17), "b torch.bfloat16 (3, 17)"),
    ],
)
def test_what_would_be_misread_is_kept_out_of_a_slot(
    a: tuple[int, int], b: tuple[int, int], shown: str
) -> None:
    slots = LoRASlots.empty(2, 30, (0, 40, 57), 6, torch.bfloat16, "cpu")
    pair = Matrices(torch.zeros(a).bfloat16(), torch.zeros(b).bfloat16())
    with pytest.raises(ValueError, match=re.escape(shown)):
        slots.put(1, (None, pair))
    right = Matrices(torch.zeros(4, 30).bfloat16(), torch.zeros(4, 17).bfloat16())
    assert [entry[0] for entry in slots.put(1, (None, right))] == [0, 0, 0, 0]
    for wrong in (
        right._replace(a=torch.zeros(30, 4).bfloat16().T),
        right._replace(scales=torch.zeros(2, 4)),
        Matrices(right.a.to(torch.int8), right.b.to(torch.int8), torch.zeros(2, 3)),
        Matrices(right.a.to(torch.int8), right.b.to(torch.int8), torch.zeros(2, 4).double()),
    ):
        with pytest.raises(ValueError, match="expected contiguous"):
            slots.put(1, (None, wrong))
    codes = Matrices(torch.zeros(4, 30).to(torch.int8), torch.zeros(4, 40).to(torch.int8))
    with pytest.raises(ValueError, match="in 8 bits and others"):
        slots.put(1, (codes._replace(scales=torch.zeros(2, 4)), right))
    with pytest.raises(ValueError, match="expected int64"):
        replace(slots, table=slots.table.int())


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
    given = random_slots(3, 6, 30, offsets, torch.float32)
    slots = [2, 1, -1, 2]
    x, out = torch.randn(4, 30), torch.randn(4, 57)
    expected, _ = exactly(out, x, given, slots)
    batch = LoRABatch.of(slots, "cpu")
    assert batch is not None
    cpu = backend_for(torch.device("cpu"), torch.float32)
    cpu.lora_add(out, x, given, batch)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
