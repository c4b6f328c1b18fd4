"""The Triton LoRA kernels compute what their reference does, row by row.

On a machine without a GPU they run through Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.lora import LoRASlots, Matrices
from nybble.kernels.lora_batch import LoRABatch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from nybble.kernels.triton import lora  # noqa: E402


def problem(
    rows: int, ranks: list[int], max_rank: int, inputs: int, outputs: tuple[int, ...], seed: int = 0
) -> tuple[Tensor, Tensor, LoRASlots]:
    """Random (out, x, slots). What lies behind each matrix is NaN, which reading would spread."""
    torch.manual_seed(seed)
    offsets = tuple(sum(outputs[:part]) for part in range(len(outputs) + 1))

    def matrix(rank: int, width: int) -> Tensor:
        whole = torch.full((rank + 1, width), float("nan"), dtype=torch.float16)
        whole[:rank] = torch.randn(rank, width) * width**-0.5
        return whole.to(DEVICE)[:rank]

    adapters = [
        [
            Matrices(matrix(rank, inputs), matrix(rank, out) * out**0.5) if rank else None
            for out in outputs
        ]
        for rank in ranks
    ]
    if len(outputs) > 1:
        adapters[-1][1] = None  # a part that one adapter leaves as it is
    slots = replace(LoRASlots.of(adapters, inputs, offsets), max_rank=max_rank)
    x, out = torch.randn(rows, inputs).half(), torch.randn(rows, offsets[-1]).half()
    return out.to(DEVICE), x.to(DEVICE), slots


@pytest.mark.parametrize(
    ("slots", "outputs", "inputs"),
    [
        ([1], (40,), 64),
        ([2, -1, 0, 1, 1, -1, 3], (130, 20, 20), 1100),  # three parts, two chunks of the inside
        ([1] * 250 + [3] * 17 + [-1] + [2], (33, 150), 50),  # several tall tiles of one adapter
        ([1] * 20 + [3], (24,), 40),  # several tiles of 16
        ([0, 0], (16,), 16),  # an adapter without ranks here
    ],
)
def test_every_row_gets_its_adapter(
    slots: list[int], outputs: tuple[int, ...], inputs: int
) -> None:
    out, x, given = problem(len(slots), [0, 5, 16, 20], 20, inputs, outputs)
    batch = LoRABatch.of(slots, DEVICE)
    assert batch is not None
    expected = out.clone()
    reference.lora_add(expected, x, given, batch)
    found = out.clone()
    lora.lora_add(found, x, given, batch)
    untouched = [row for row, slot in enumerate(slots) if slot <= 0]
    assert torch.equal(found[untouched], out[untouched])
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-3


def test_a_row_does_not_depend_on_its_batch() -> None:
    slots = [row % 4 for row in range(23)]
    out, x, given = problem(23, [8, 1, 16, 3], 16, 96, (40, 24))
    together = out.clone()
    batch = LoRABatch.of(slots, DEVICE)
    assert batch is not None
    lora.lora_add(together, x, given, batch)
    for row in (0, 7, 22):
        one = LoRABatch.of([slots[row]], DEVICE)
        assert one is not None
        alone = out[row : row + 1].clone()
        lora.lora_add(alone, x[row : row + 1], given, one)
        assert torch.equal(alone[0], together[row])


def test_empty_segments_that_pad_a_captured_batch_add_nothing() -> None:
    out, x, given = problem(4, [4, 4], 8, 32, (24,))
    real = LoRABatch.of([1, -1, -1, -1], DEVICE)
    assert real is not None

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    padded = LoRABatch(
        slots=real.slots,
        order=tensor([0, 0, 0, 0]),
        segment_starts=tensor([0, 1, 1, 1, 1]),
        segment_slots=tensor([1, -1, -1, -1]),
        max_segment=4,
    )
    expected, found = out.clone(), out.clone()
    lora.lora_add(expected, x, given, real)
    lora.lora_add(found, x, given, padded)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input for each expert"])
@pytest.mark.parametrize(
    ("rows", "load"), [(1, "even"), (7, "even"), (40, "one"), (40, "even"), (40, "base")]
)
def test_adapters_on_experts_are_found_on_the_device(rows: int, load: str, shared: bool) -> None:
    """Two slots of each of five experts; every third row has no adapter, or all have none."""
    experts, count, top_k = 5, 2, 3
    torch.manual_seed(rows)
    _, _, given = problem(1, [0, 5, 16, 3, 8, 20, 1, 0, 4, 20], 20, 72, (40, 24))
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)])
    if load == "one":  # all rows at the same experts, with the same adapter
        ids[:] = torch.tensor([4, 2, 0])
    slots = torch.tensor([1 - row % 3 if load == "even" else 0 for row in range(rows)])[:, None]
    slots = torch.where((slots < 0) | (load == "base"), -1, ids * count + slots).to(DEVICE)
    x = torch.randn(rows, *(() if shared else (top_k,)), 72).half().to(DEVICE)
    out = torch.randn(rows, top_k, 64).half().to(DEVICE)
    expected, found = out.clone(), out.clone()
    if (add := reference.grouped_lora(slots, experts * count)) is not None:
        add(expected, x, given)
    routed = lora.grouped_lora(slots, experts * count)
    assert routed is not None
    routed(found, x, given)
    assert torch.equal(found[slots < 0], out[slots < 0])
    assert (found.double() - expected.double()).norm() <= 1e-3 * expected.double().norm()
    assert (load == "base") == torch.equal(found, out)


def test_a_row_on_experts_does_not_depend_on_its_batch() -> None:
    _, _, given = problem(1, [8, 1, 16, 3], 16, 96, (40, 24))
    slots = torch.tensor([[row % 2, 2 + row % 2] for row in range(37)], device=DEVICE)
    x, out = torch.randn(37, 96).half().to(DEVICE), torch.randn(37, 2, 64).half().to(DEVICE)
    together = out.clone()
    add = lora.grouped_lora(slots, 4)
    assert add is not None
    add(together, x, given)
    for row in (0, 20, 36):
        one, alone = slice(row, row + 1), out[row : row + 1].clone()
        own = lora.grouped_lora(slots[one], 4)
        assert own is not None
        own(alone, x[one], given)
        assert torch.equal(alone, together[one])


def test_a_layer_that_reads_other_rows_is_refused() -> None:
    _, _, given = problem(1, [8], 8, 96, (40,))
    add = lora.grouped_lora(torch.zeros(4, 2, dtype=torch.int64, device=DEVICE), 1)
    assert add is not None
    with pytest.raises(ValueError, match=r"x is \(3, 96\), expected \(4, …\) or \(4, 2, …\)"):
        add(torch.zeros(4, 2, 40, device=DEVICE).half(), torch.zeros(3, 96).half(), given)
