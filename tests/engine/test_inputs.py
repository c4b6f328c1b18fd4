"""Step inputs follow the batch, whatever happened to its sequences before, and pad cleanly."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from nybble.engine.block_manager import BlockManager
from nybble.engine.drafter import Draft
from nybble.engine.graphs import (
    MixedShape,
    StepShape,
    bucket_sizes,
    mixed_shapes,
    verify_shapes,
)
from nybble.engine.inputs import InputBuffers, StepInputs
from nybble.engine.request import Request, SamplingParams
from nybble.engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from nybble.engine.sequence import BlockTable, Sequence
from nybble.kernels.lora_batch import LoRABatch

BLOCK = 4


def buffers(max_seqs: int = 8, groups: int = 1, max_blocks: int = 10) -> InputBuffers:
    return InputBuffers(
        max_seqs=max_seqs,
        max_tokens=64,
        max_blocks=max_blocks,
        block_size=BLOCK,
        group_of_layer=range(groups),
        device=torch.device("cpu"),
    )


def sequence(length: int, computed: int, *tables: list[int]) -> Sequence:
    request = Request("r", tuple(range(100, 100 + length)), SamplingParams())
    made = Sequence(request, 1, detokenizer=None, sampler=None)  # type: ignore[arg-type]
    made.num_computed_tokens = computed
    made.block_tables = tuple(BlockTable(blocks) for blocks in tables)
    return made


def check(inputs: StepInputs, batch: ScheduledBatch) -> None:
    """Every array says what the batch says."""
    attention, row = inputs.attention[0], 0
    for index, item in enumerate(batch):
        owner, start = item.sequence, item.sequence.num_computed_tokens
        assert attention.query_start[index] == row
        assert attention.context_lens[index] == start + item.num_tokens
        for group, of in zip(inputs.attention, owner.block_tables, strict=True):
            assert group.block_tables[index, : len(of.blocks)].tolist() == of.blocks
        for position in range(start, start + item.num_tokens):
            assert inputs.token_ids[row] == owner.token_ids[position]
            assert inputs.positions[row] == position
            for group, of in zip(inputs.attention, owner.block_tables, strict=True):
                slot = of.blocks[position // BLOCK] * BLOCK + position % BLOCK
                assert group.slot_mapping[row] == slot
            row += 1
    assert attention.query_start[len(batch)] == row
    counts = tuple(item.num_tokens for item in batch)
    assert attention.max_query == max(counts)
    # Where each has one, nobody needs to know.
    assert attention.rows == (counts if max(counts) > 1 else None)
    ends = [int(attention.query_start[i + 1]) - 1 for i, item in enumerate(batch) if item.completes]
    assert inputs.last_rows.tolist() == ends


@pytest.mark.parametrize("groups", [1, 3])
def test_inputs_follow_sequences_that_come_grow_lose_their_blocks_and_return(groups: int) -> None:
    chance = random.Random(0)
    built = buffers(groups=groups)
    everyone = [sequence(40, 0) for _ in range(8)]
    free = list(range(200 * groups))
    for _ in range(300):
        batch: ScheduledBatch = []
        for one in everyone:
            fate = chance.random()
            left = len(one.token_ids) - one.num_computed_tokens
            if fate < 0.1 or left == 0:  # preempted, or finished: its blocks come back as others
                one.num_computed_tokens = 0
                free += [block for table in one.block_tables for block in table.blocks]
                one.block_tables = ()
                chance.shuffle(free)
            elif fate < 0.85:
                count = 1 if fate < 0.6 else chance.randint(1, min(left, 7))
                one.block_tables = one.block_tables or tuple(BlockTable() for _ in range(groups))
                while one.num_table_blocks * BLOCK < one.num_computed_tokens + count:
                    for table in one.block_tables:
                        table.blocks.append(free.pop())
                batch.append(ScheduledSequence.of(one, count))
        if chance.random() < 0.1:
            chance.shuffle(batch)
        if not batch:
            continue
        check(built.build(batch), batch)
        for item in batch:
            item.sequence.num_computed_tokens += item.num_tokens


def test_inputs_follow_a_scheduler_that_takes_blocks_and_gives_others_in_one_step() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    preempted = 0
    for seed in range(20):
        chance = random.Random(seed)
        blocks, seats = chance.randint(8, 40), chance.randint(2, 6)
        scheduler = Scheduler(BlockManager(blocks, BLOCK), seats, chance.randint(seats, 24))
        built = buffers(seats, max_blocks=blocks)
        for _ in range(200):
            if chance.random() < 0.6 and len(scheduler.waiting) < 20:
                tenant, length = chance.choice("abc"), chance.randint(1, BLOCK * blocks // 2)
                # Some share a prefix, some do not.
                prompt = tuple(range(chance.choice([0, 0, 1000]), 2000)[:length])
                params = SamplingParams(max_tokens=8)
                request = Request("r", prompt, params, tenant=tenant, weight=weights[tenant])
                scheduler.add(Sequence(request, 8, detokenizer=None, sampler=None))  # type: ignore[arg-type]
            batch = scheduler.schedule()
            if not batch:
                continue
            check(built.build(batch), batch)
            for item in batch:
                completes, owner = item.completes, item.sequence
                scheduler.computed(item)
                if completes:
                    owner.token_ids.append(chance.randrange(5000))
                    if owner.num_output_tokens == 8:
                        scheduler.finish(owner)
        preempted += scheduler.preemptions
    assert preempted > 100


def test_padding_rows_have_no_context_and_write_nothing() -> None:
    batch = [
        ScheduledSequence.of(sequence(6, 5, [7, 3]), 1),
        ScheduledSequence.of(sequence(3, 2, [1]), 1),
    ]
    inputs = buffers().build(batch, pad_to=4)
    assert inputs.token_ids.tolist() == [105, 102, 0, 0]
    (attention,) = inputs.attention
    assert attention.query_start.tolist() == [0, 1, 2, 3, 4]
    assert attention.context_lens.tolist() == [6, 3, 0, 0]
    assert attention.rows is None  # of a graph that is run again with others
    assert attention.slot_mapping.tolist() == [3 * BLOCK + 1, BLOCK + 2, -1, -1]
    assert inputs.last_rows.tolist() == [0, 1, 2, 3]


def test_padded_inputs_of_a_size_lie_where_they_lay_before() -> None:
    built = buffers(groups=2)

    def places(count: int) -> list[int]:
        batch = [
            ScheduledSequence.of(sequence(5, 4, [row, 8], [9, row]), 1) for row in range(count)
        ]
        inputs = built.build(batch, [row % 2 for row in range(count)], pad_to=6)
        assert inputs.lora is not None
        attention = [array for group in inputs.attention for array in vars(group).values()]
        arrays = (inputs.token_ids, inputs.positions, *attention)
        lora = tuple(vars(inputs.lora).values())
        return [array.data_ptr() for array in (*arrays, *lora) if isinstance(array, Tensor)]

    assert places(2) == places(6)


def test_shorter_drafts_are_padded_by_rows_that_write_nothing() -> None:
    draft = Draft((50, 51), (0, 0))
    batch = [
        ScheduledSequence.of(sequence(6, 5, [7, 3]), 1, draft, 2),
        ScheduledSequence.of(sequence(3, 2, [1, 6]), 1, draft, 1),
    ]
    inputs = buffers().build(batch, [2, -1], pad_to=3, width=3)
    assert inputs.token_ids.tolist() == [105, 50, 51, 102, 50, 0, 0, 0, 0]
    assert inputs.positions.tolist() == [5, 6, 7, 2, 3, 4, 0, 1, 2]
    (attention,) = inputs.attention
    assert attention.query_start.tolist() == [0, 3, 6, 9]
    # A row sees what is before it: those behind a draft are not seen by its own.
    assert attention.context_lens.tolist() == [8, 5, 0]
    assert attention.max_query == 3
    first, second = 3 * BLOCK, BLOCK
    assert attention.slot_mapping.tolist() == [
        *(first + 1, first + 2, first + 3),
        *(second + 2, second + 3, -1),
        *(-1, -1, -1),
    ]
    assert inputs.last_rows.tolist() == [*range(9)]
    assert inputs.lora is not None
    assert inputs.lora.slots.tolist()[:3] == [2, 2, 2]
    assert len(inputs.lora.order) == 9


def test_prompts_and_decodes_are_padded_by_rows_of_no_sequence_that_write_nothing() -> None:
    batch = [
        ScheduledSequence.of(sequence(9, 3, [7, 3, 5]), 3),
        ScheduledSequence.of(sequence(3, 2, [1]), 1),
        ScheduledSequence.of(sequence(2, 0, [6]), 2),
    ]
    inputs = buffers().build(batch, [1, -1, 1], pad_to=5, pad_rows=8)
    assert inputs.token_ids.tolist() == [103, 104, 105, 102, 100, 101, 0, 0]
    assert inputs.positions.tolist() == [3, 4, 5, 2, 0, 1, 0, 0]
    (attention,) = inputs.attention
    assert attention.query_start.tolist() == [0, 3, 4, 6, 6, 6]
    assert attention.context_lens.tolist() == [6, 3, 2, 0, 0]
    assert (attention.rows, attention.max_query) == (None, 8)  # the next batch has others
    own = [7 * BLOCK + 3, 3 * BLOCK, 3 * BLOCK + 1, BLOCK + 2, 6 * BLOCK, 6 * BLOCK + 1]
    assert attention.slot_mapping.tolist() == [*own, -1, -1]
    assert inputs.last_rows.tolist() == [3, 5]  # the first one's prompt is not at its end
    assert inputs.lora is not None
    assert inputs.lora.slots.tolist() == [1, 1, 1, -1, 1, 1, -1, -1]
    assert inputs.lora.order.tolist()[:5] == [0, 1, 2, 4, 5]
    assert inputs.lora.segment_starts.tolist() == [0, 5, 5, 5, 5, 5]


def test_inputs_padded_to_rows_lie_where_they_lay_before() -> None:
    built = buffers()

    def places(counts: tuple[int, ...]) -> list[int]:
        batch = [ScheduledSequence.of(sequence(9, 0, [7, 3, 5]), count) for count in counts]
        inputs = built.build(batch, [0] * len(counts), pad_to=6, pad_rows=16)
        assert inputs.lora is not None
        arrays = (*vars(inputs.attention[0]).values(), *vars(inputs.lora).values())
        return [each.data_ptr() for each in arrays if isinstance(each, Tensor)]

    assert places((5, 1, 9)) == places((1,)) == places(())


@pytest.mark.parametrize("pad_to", [0, 5])
def test_rows_are_grouped_by_adapter(pad_to: int) -> None:
    counts = [1, 1, 1] if pad_to else [3, 1, 2]
    batch = [ScheduledSequence.of(sequence(9, 0, [row, 9, 8]), n) for row, n in enumerate(counts)]
    lora = buffers().build(batch, [4, -1, 2], pad_to=pad_to).lora
    rows = [slot for slot, n in zip([4, -1, 2], counts, strict=True) for _ in range(n)]
    expected = LoRABatch.of(rows, "cpu")
    assert lora is not None
    assert expected is not None
    assert lora.slots.tolist() == rows + [-1] * (len(lora.slots) - len(rows))
    adapted, segments = len(expected.order), len(expected.segment_slots)
    assert lora.order[:adapted].tolist() == expected.order.tolist()
    starts = expected.segment_starts.tolist()
    assert lora.segment_starts.tolist() == starts + [adapted] * (len(lora.segment_slots) - segments)
    assert lora.segment_slots[:segments].tolist() == expected.segment_slots.tolist()
    assert lora.max_segment >= expected.max_segment


def test_captured_batch_sizes_end_with_the_largest_batch() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(6) == [1, 2, 4, 6]
    assert bucket_sizes(64)[-2:] == [56, 64]


def test_captured_drafts_are_of_few_lengths_and_end_with_the_longest() -> None:
    assert verify_shapes(1, 3) == [StepShape(1, 2), StepShape(1, 3), StepShape(1, 4)]
    assert {shape.seqs for shape in verify_shapes(64, 8)} == {1, 2, 4, 8}
    assert {shape.width for shape in verify_shapes(64, 8)} == {2, 3, 5, 9}
    assert max(verify_shapes(3, 1)) == StepShape(3, 2)


def test_captured_steps_of_prompts_have_few_numbers_of_rows() -> None:
    assert [shape.rows for shape in mixed_shapes(64, 2048)] == [16, 32, 64, 128, 256]
    assert mixed_shapes(4, 40) == [MixedShape(4, 16), MixedShape(4, 32), MixedShape(4, 40)]
    assert mixed_shapes(20, 8) == [MixedShape(8, 8)]
