"""An adapter takes as much memory as its ranks, on the CPU and in a GPU's buffer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.engine import AdapterConfig
from nybble.engine.adapter_memory import AdapterMemory
from nybble.engine.adapter_slots import AdapterSlots
from nybble.kernels import reference as kernels
from nybble.kernels.lora_batch import LoRABatch
from nybble.loaders import load_adapter, open_checkpoint

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


def test_a_thousand_adapters_are_resident_at_once_in_the_bytes_of_their_files(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """Though slots may hold rank 256, which would take 128 times as much."""
    folder = tiny_adapter(r=2, target_modules=["k_proj", "v_proj"])
    numbers = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    count, budget = 1000, 1000 * 4 * numbers  # float32
    config = AdapterConfig(slots=count, max_rank=256, host_bytes=budget)
    engine = reference.start(open_checkpoint(tiny_model()), adapters=config)
    try:
        for index in range(count):
            assert engine.load_adapter(f"{index}", str(folder)).nbytes == 4 * numbers
        expected = reference.alone(engine, range(3, 20), 4, adapter="0")
        for index in (1, 500, 999):
            assert reference.alone(engine, range(3, 20), 4, adapter=f"{index}") == expected
        usage = engine.adapter_usage()
        assert (usage.device, usage.host, usage.disk) == (4, count - 4, 0)
    finally:
        engine.stop()


def test_on_the_cpu_a_slot_refers_to_host_memory(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    architecture = open_checkpoint(tiny_model()).architecture
    slots = AdapterSlots(architecture, count=3, max_rank=8, device=CPU, dtype=torch.bfloat16)
    staged = slots.stage(load_adapter(tiny_adapter(), architecture))
    slots.fill(1, staged)
    begin, end = staged.memory.data_ptr(), staged.memory.data_ptr() + staged.memory.nbytes
    table = slots.projections[0].low_rank.table
    assert ((begin <= table[:2, 1]) & (table[:2, 1] < end)).all()
    slots.clear(1)
    assert not table[2].any()


def test_a_buffer_holds_what_fits_whatever_was_there_before() -> None:
    """Adapters of many sizes come and go; each slot has its own numbers, wherever they lie."""
    rng = random.Random(0)
    memory = AdapterMemory(100, torch.float32, CPU)
    held: dict[int, torch.Tensor] = {}
    moves = 0
    for turn in range(300):
        slot, numbers = rng.randrange(8), rng.randint(1, 40)
        memory.release(slot)
        held.pop(slot, None)
        while memory.free < numbers:
            gone = rng.choice(sorted(held))
            memory.release(gone)
            del held[gone]
        adapter = torch.full((numbers,), float(turn))
        placed = dict(memory.put(slot, adapter, [numbers]))
        moves += len(placed) - 1
        held[slot] = adapter
        for each, found in held.items():
            assert torch.equal(memory.numbers(each), found)
            assert memory.length(each) == len(found)
            assert memory.ranks(each) == [len(found)]
        assert memory.free == 100 - sum(map(len, held.values()))
    assert moves > 50
    with pytest.raises(ValueError, match="does not fit"):
        memory.put(9, torch.zeros(101), [101])


def test_adapters_that_were_moved_together_in_a_buffer_are_still_computed(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """A GPU's buffer, in host memory here: it holds two adapters of rank 8, or more of less."""
    architecture = open_checkpoint(tiny_model()).architecture
    slots = AdapterSlots(architecture, count=4, max_rank=8, device=CPU, dtype=torch.float32)
    whole = slots.layout.size([8] * len(architecture.linears))
    slots._memory = AdapterMemory(2 * whole, torch.float32, CPU)
    assert not slots.refer_to_host
    adapters = {
        rank: load_adapter(tiny_adapter(r=rank, seed=rank), architecture) for rank in (2, 4, 6, 8)
    }
    in_slots: dict[int, int] = {}

    def put(slot: int, rank: int) -> None:
        slots.fill(slot, slots.stage(adapters[rank]))
        in_slots[slot] = rank
        for each, own in in_slots.items():
            x = torch.randn(1, 128)
            for projection in slots.projections:
                low_rank = projection.low_rank
                out = torch.zeros(1, low_rank.offsets[-1])
                if low_rank.inputs != 128:
                    continue
                batch = LoRABatch.of([each], "cpu")
                assert batch is not None
                kernels.lora_add(out, x, low_rank, batch)
                modules = [adapters[own].modules[name] for name in projection.modules]
                expected = torch.cat([x @ m.a.T @ (m.scale * m.b).T for m in modules], 1)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for index, slot_ in enumerate(in_slots):
            table = slots.projections[index].low_rank.table
            assert (table[2, slot_] == in_slots[slot_]).all()

    put(0, 4)
    put(1, 2)
    put(2, 8)
    assert slots.free_bytes == 4 * whole * 2 // 8
    slots.clear(1)
    del in_slots[1]
    assert slots.bytes_for(slots.stage(adapters[4])) == slots.free_bytes
    put(3, 4)  # there is room, but not in one piece
    assert slots.free_bytes == 0
    put(2, 6)
    assert slots.bytes_in(2) == 4 * whole * 6 // 8


def test_a_buffer_smaller_than_one_adapter_of_the_highest_rank_is_refused(
    tiny_model: Callable[..., Path],
) -> None:
    architecture = open_checkpoint(tiny_model()).architecture
    with pytest.raises(ValueError, match="an adapter of rank 64 on all layers but experts takes"):
        AdapterSlots(
            architecture,
            count=2,
            max_rank=64,
            device=torch.device("meta"),
            dtype=torch.float16,
            device_bytes=1 << 10,
        )
