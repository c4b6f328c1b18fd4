"""Runs a scheduled batch through the model: block tables and slots in, logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nybble.engine.adapter_ends import StepEnds
from nybble.engine.adapter_slots import AdapterSlots, StepAdapters
from nybble.engine.config import EngineConfig, resolve_device
from nybble.engine.decoder import Decoder
from nybble.engine.graphs import (
    AdapterUse,
    Capture,
    DecodeGraphs,
    MixedGraphs,
    MixedShape,
    StepShape,
    bucket_sizes,
    cuda_capture,
    mixed_shapes,
    verify_shapes,
)
from nybble.engine.inputs import InputBuffers, StepInputs, StepItem, StepMessage
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.parts import KVCache, States
from nybble.engine.prompt_reader import chunked_logits
from nybble.engine.transfer import send
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.huge_pages import empty_in_huge_pages
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.progress import Progress, track
from nybble.kernels.reference import TokenChoice
from nybble.kernels.state_batch import StateBatch
from nybble.models import AnyAttention, Recurrent

_ANY_CHOICE = TokenChoice(temperature=1.0, top_k=1, top_p=0.5, min_p=0.1, uniform=0.5)


def free_kv_bytes(device: torch.device) -> int:
    """Memory for the KV cache where none is named, once the weights are on the device."""
    if device.type != "cuda":
        return 1 << 30
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # A tenth is for activations, captured graphs, and whoever else uses the device.
    return max(0, free - total // 10)


class ModelRunner:
    """Owns the KV cache tensors and turns scheduled sequences into model inputs.

    num_states: slots for the states of layers that keep no keys and values.
    caches: of each layer with attention, and of those that the layout has beside them.
    captured: what the decoder has captured in the last run, ``(rows, layers · hidden)``; None if it
        captures nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        layout: KVCacheLayout,
        num_blocks: int,
        adapters: AdapterSlots | None = None,
        num_states: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """device: None for the config's."""
        self.adapters = adapters
        self.layout = layout
        self.decoder = decoder
        self.device = device or resolve_device(config.device)
        self._max_num_seqs = config.max_num_seqs
        self._max_batched_tokens = config.max_batched_tokens
        # Kernels of one order have one configuration for all numbers of rows, and no other.
        self._one_order = config.deterministic
        self._tune = config.tune
        self._max_draft_tokens = 0 if config.speculate == "off" else config.max_draft_tokens
        self._max_blocks = -(-decoder.max_model_len // config.block_size)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            if self.device.type == "cpu":
                return empty_in_huge_pages(shape, dtype).zero_()
            return torch.zeros(shape, dtype=dtype, device=self.device)

        def cache(attention: AnyAttention) -> KVCache:
            heads = (num_blocks, attention.kv_heads, config.block_size)
            whole = (*heads, attention.head_dim)
            tensors = range(attention.cache_tensors)
            if config.kv_dtype == "auto":
                return tuple(zeros(config.dtype, *whole) for _ in tensors)
            kind = torch.int8 if config.kv_dtype == "int8" else torch.float8_e4m3fn
            entries = [zeros(kind, *whole) for _ in tensors]
            return (*entries, *(zeros(torch.float32, *heads) for _ in tensors))

        # Layers at the same place of their groups use the same memory, for blocks of their own.
        places = [
            cache(layout.layers[layer])
            for layer, place in enumerate(layout.place_in_block)
            if place not in layout.place_in_block[:layer]
        ]
        self.caches = [places[place] for place in layout.place_in_block]

        def states(mixer: Recurrent) -> States:
            return tuple(
                zeros(torch.float32 if state.wide else config.dtype, num_states, *state.shape)
                for state in mixer.states
            )

        self.states = [states(mixer) for mixer in decoder.architecture.recurrents]
        self._dtype = config.dtype
        self._inputs = InputBuffers(
            max_seqs=config.max_num_seqs,
            max_tokens=config.max_batched_tokens,
            max_blocks=self._max_blocks,
            block_size=config.block_size,
            group_of_layer=layout.group_of_layer,
            device=self.device,
            states=bool(self.states),
        )
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        self.captured: Tensor | None = None
        self._in_graphs: Tensor | None = None  # where graphs leave what they capture

    def run(self, batch: Sequence[StepItem]) -> Tensor:
        """Compute every scheduled token.

        Returns float32 logits ``(sampling, vocab)``, for each scheduled sequence as many rows as it
        samples tokens, in the order of the batch; they are overwritten by the next run. Prompts
        that are read are handed to their readers.
        """
        lora_slots = [item.sequence.adapter_slot for item in batch]
        adapted = any(slot >= 0 for slot in lora_slots)
        slots = lora_slots if adapted else None
        use = self._adapter_use(adapted)
        if self._graphs is not None and (shape := self._captured_shape(batch, use)) is not None:
            self._inputs.build(batch, slots, pad_to=shape.seqs, width=shape.width)
            logits = self._graphs.run(shape, use)
            own_rows = self._rows_in(batch, shape)
            self.captured = None if self._in_graphs is None else self._in_graphs[own_rows]
            return logits[own_rows]
        rows = sum(item.num_tokens for item in batch)
        mixed = None if self._mixed is None else self._mixed.shape_for(rows, use)
        if mixed is None:
            inputs = self._inputs.build(batch, slots)
        else:
            inputs = self._inputs.build(batch, slots, pad_to=mixed.seqs, pad_rows=mixed.rows)
        hidden, ends = self._hidden(inputs, rows, mixed, use)
        row = 0
        for item in batch:
            if item.prompt_reader is not None:
                stop = row + item.num_tokens
                own = None if ends is None else ends.of(torch.arange(row, stop))
                item.prompt_reader.read(self.decoder, hidden[row:stop], item.start, own)
            row += item.num_tokens
        return self._logits(hidden, inputs, ends)

    def follow(self, message: StepMessage) -> None:
        """Compute this rank's part of a step that :meth:`run` computes at rank 0."""
        inputs = self._inputs.follow(message)
        use = self._adapter_use(inputs.lora is not None)
        if message.padded_to and not message.rows and self._graphs is not None:
            self._graphs.run(StepShape(message.padded_to, message.width), use)
            return
        mixed = MixedShape(message.padded_to, message.rows) if message.rows else None
        hidden, ends = self._hidden(inputs, len(inputs.token_ids), mixed, use)
        for first, count in message.reads:
            own = None if ends is None else ends.of(torch.arange(first, first + count))
            for _ in chunked_logits(self.decoder, hidden[first : first + count], own):
                pass
        self._logits(hidden, inputs, ends)

    def _hidden(
        self, inputs: StepInputs, rows: int, mixed: MixedShape | None, use: AdapterUse
    ) -> tuple[Tensor, StepEnds | None]:
        """Hidden states of the first rows, and what adapters change at the ends.

        mixed: the graph that computes them; None for none.
        """
        if mixed is not None:
            assert self._mixed is not None
            hidden = self._mixed.run(mixed, use)[:rows]
            self.captured = None if self._in_graphs is None else self._in_graphs[:rows]
            return hidden, None  # adapters on a GPU change nothing there
        adapters = self._step_adapters(inputs)
        captured: list[Tensor] = []
        hidden = self._forward(inputs, adapters, captured)
        self.captured = torch.cat(captured, dim=-1) if captured else None
        return hidden, None if adapters is None else adapters.ends

    def _captured_shape(self, batch: Sequence[StepItem], use: AdapterUse) -> StepShape | None:
        """The graph that computes a step: one of decodes and of sequences that verify drafts."""
        assert self._graphs is not None
        width = max(item.num_tokens for item in batch)
        if not all(item.decodes or item.verifies for item in batch):
            return None
        shape = self._graphs.shape_for(len(batch), width, use)
        if shape is None or shape.width == 1:
            return shape
        # Rows that pad a sequence have positions too, and there are no more than these.
        fits = all(item.start + shape.width <= self.decoder.max_model_len for item in batch)
        return shape if fits else None

    def _rows_in(self, batch: Sequence[StepItem], shape: StepShape) -> slice | Tensor:
        """Which rows of a captured step are the batch's."""
        if all(item.num_tokens == shape.width for item in batch):
            return slice(len(batch) * shape.width)
        rows = [
            index * shape.width + row
            for index, item in enumerate(batch)
            for row in range(item.num_tokens)
        ]
        return send(rows, torch.int64, self.device)

    def _adapter_use(self, adapted: bool) -> AdapterUse:
        """What a step applies, some of whose rows have adapters or none."""
        if not adapted or self.adapters is None:
            return AdapterUse.NONE
        return AdapterUse.ON_EXPERTS if self.adapters.change_experts else AdapterUse.ON_LAYERS

    @property
    def _adapter_uses(self) -> list[AdapterUse]:
        """What steps of this model may apply."""
        if self.adapters is None:
            return [AdapterUse.NONE]
        on_experts = [AdapterUse.ON_EXPERTS] if self.decoder.architecture.has_experts else []
        return [AdapterUse.NONE, AdapterUse.ON_LAYERS, *on_experts]

    def _step_adapters(
        self, inputs: StepInputs, use: AdapterUse | None = None
    ) -> StepAdapters | None:
        """use: None for what those in slots need."""
        if self.adapters is None or inputs.lora is None:
            return None
        on_experts = None if use is None else use == AdapterUse.ON_EXPERTS
        return self.adapters.for_step(inputs.lora, self.decoder.backend, on_experts=on_experts)

    def _forward(
        self,
        inputs: StepInputs,
        adapters: StepAdapters | None,
        captured: list[Tensor] | None = None,
    ) -> Tensor:
        return self.decoder.forward(
            inputs.token_ids,
            inputs.positions,
            self.caches,
            inputs.attention,
            adapters,
            self.states,
            inputs.states,
            captured,
        )

    def _logits(self, hidden: Tensor, inputs: StepInputs, ends: StepEnds | None = None) -> Tensor:
        if not len(inputs.last_rows):
            return torch.empty(0, self.decoder.architecture.vocab, device=self.device)
        own = None if ends is None else ends.of(inputs.last_rows)
        return self.decoder.logits(hidden[inputs.last_rows], own)

    def reset(self) -> None:
        """Empty the KV cache in place: graphs that were captured go on reading it."""
        for cache in (*self.caches, *self.states):
            for tensor in cache:
                tensor.zero_()

    def warm_up(self, progress: Progress = True) -> None:
        """Compile every kernel variant that serving will use, then capture the decode step.

        Matmuls of which nobody has measured the configuration are tuned first, if the settings
        say so. Does nothing on the CPU, whose kernels are compiled ahead of time.
        """
        if self.device.type != "cuda":
            return
        from nybble.kernels.triton.tune import tune_unknown
        from nybble.kernels.triton.warmup import warmup

        with torch.inference_mode():
            if not self._one_order:
                weights = list(self.decoder.packed_weights())
                if self._tune:
                    tune_unknown(weights, self._dtype, self._max_batched_tokens, progress=progress)
                # Every family here has one activation in all its layers.
                layers = self.decoder.architecture.layers
                activation = next(each.mlp.activation for each in layers if each.mlp is not None)
                most = self._max_batched_tokens
                warmup(weights, self._dtype, most, activation, progress=progress)
            for tokens, seqs in track(self._warm_up_sizes(), "Compiling kernels", progress):
                inputs = self._idle_prefill(tokens, seqs)
                for use in self._adapter_uses:
                    unused = use == AdapterUse.NONE
                    for slots in [None] if unused else self._warm_up_slots(tokens, seqs):
                        lora = None if slots is None else LoRABatch.of(slots, self.device)
                        adapted = replace(inputs, lora=lora)
                        hidden = self._forward(adapted, self._step_adapters(adapted, use))
                        self._logits(hidden, adapted)
            vocab = self.decoder.architecture.vocab
            # Kernels differ for multiples of 16: an adapter's own tokens may make it one, or not.
            odd = vocab | 15
            for size in (vocab,) if self.adapters is None else (odd, odd + 1):
                logits = torch.zeros(1, size, device=self.device)
                self.decoder.backend.sample_tokens(logits, [_ANY_CHOICE])
        self.capture(cuda_capture(self.device), progress)

    @torch.inference_mode()
    def capture(
        self, capture: Capture, progress: Progress = True, sizes: Sequence[int] | None = None
    ) -> None:
        """Compute steps by graphs made by ``capture`` from now on.

        Those that decode, of the usual batch sizes or these. Unless layers keep states also those
        that verify drafts, and if there are no ``sizes`` those of prompts: what such layers compute
        of them is another sequence of launches for every batch.
        """
        mixed = []
        if sizes is None and not self.states:
            mixed = mixed_shapes(self._max_num_seqs, self._max_batched_tokens)
        sizes = bucket_sizes(self._max_num_seqs) if sizes is None else sizes
        shapes = [*map(StepShape, sizes), *self._verify_shapes]
        most = max(shape.rows for shape in shapes)
        # One place for the logits of all graphs: each would keep its own, gigabytes where the
        # vocabulary is large.
        logits = torch.empty(most, self.decoder.architecture.vocab, device=self.device)
        if captures := self.decoder.captures:
            width = len(captures) * self.decoder.architecture.hidden
            most = max([most, *(shape.rows for shape in mixed)])
            self._in_graphs = torch.empty(most, width, dtype=self._dtype, device=self.device)

        def hidden_of(inputs: StepInputs, use: AdapterUse) -> Tensor:
            captured: list[Tensor] = []
            hidden = self._forward(inputs, self._step_adapters(inputs, use), captured)
            if self._in_graphs is not None:
                self._in_graphs[: len(hidden)].copy_(torch.cat(captured, dim=-1))
            return hidden

        def compute(inputs: StepInputs, use: AdapterUse) -> Tensor:
            hidden = hidden_of(inputs, use)
            return logits[: len(inputs.last_rows)].copy_(self._logits(hidden, inputs))

        self._graphs = DecodeGraphs(
            capture,
            shapes,
            lambda shape, use: self._inputs.build(
                [], None if use == AdapterUse.NONE else [], pad_to=shape.seqs, width=shape.width
            ),
            compute,
            uses=self._adapter_uses,
            progress=progress,
        )
        self._mixed = MixedGraphs(
            capture,
            mixed,
            lambda shape, use: self._inputs.build(
                [],
                None if use == AdapterUse.NONE else [],
                pad_to=shape.seqs,
                pad_rows=shape.rows,
            ),
            hidden_of,
            uses=self._adapter_uses,
            progress=progress,
        )

    def idle_inputs(self) -> Iterator[StepInputs]:
        """Inputs of the sizes that steps have, which write nothing to the cache: prompts, decodes.

        Those of one size are valid until the next are made.
        """
        for tokens, seqs in self._warm_up_sizes():
            yield self._idle_prefill(tokens, seqs)
        for shape in [*map(StepShape, bucket_sizes(self._max_num_seqs)), *self._verify_shapes]:
            yield self._inputs.build([], pad_to=shape.seqs, width=shape.width)

    @property
    def _verify_shapes(self) -> list[StepShape]:
        """Steps that verify drafts, of those that fit the most tokens of a step."""
        if not self._max_draft_tokens or self.states:
            return []
        shapes = verify_shapes(self._max_num_seqs, self._max_draft_tokens)
        return [shape for shape in shapes if shape.rows <= self._max_batched_tokens]

    def _warm_up_sizes(self) -> list[tuple[int, int]]:
        """(tokens, sequences): each size of matmul for one prompt, each size of batch for many."""
        most = self._max_batched_tokens
        tokens = [*(1 << power for power in range(1, most.bit_length()) if 1 << power < most), most]
        powers = [1 << power for power in range(4, self._max_num_seqs.bit_length() + 1)]
        seqs = [min(n, self._max_num_seqs) for n in powers if n < 2 * self._max_num_seqs]
        return [(count, 1) for count in tokens] + [(2 * n, n) for n in seqs if 2 * n <= most]

    def _warm_up_slots(self, tokens: int, seqs: int) -> list[list[int]]:
        """Each row's adapter slot in steps of this size, one list for each kernel of adapters.

        The slots are still empty: every kernel runs and adds nothing.
        """
        assert self.adapters is not None
        count = self.adapters.count
        each = [[row * seqs // tokens % count for row in range(tokens)]]
        if (tokens, seqs) == (self._max_batched_tokens, 1):
            # A prompt beside single tokens of as many other adapters.
            most = min(count, self._max_num_seqs, tokens)
            used = [min(1 << power, most) for power in range(5, (most - 1).bit_length() + 1)]
            each += [[min(row, adapters - 1) for row in range(tokens)] for adapters in used]
        return each

    def _idle_prefill(self, tokens: int, seqs: int) -> StepInputs:
        """A prompt, with several sequences few tokens beside it and single ones: as in serving.

        They write nothing to the cache. All kernels of such steps run.
        """

        def full(count: int, value: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=self.device)

        counts = (tokens,) if seqs == 1 else (tokens - seqs, 2, *[1] * (seqs - 2))
        lengths = torch.tensor(counts, dtype=torch.int32, device=self.device)
        starts = full(seqs + 1, 0, torch.int32)
        starts[1:] = lengths.cumsum(0)
        attention = AttentionBatch(
            query_start=starts,
            context_lens=lengths,
            block_tables=full(seqs * self._max_blocks, 0, torch.int32).view(seqs, -1),
            slot_mapping=full(tokens, -1),
            max_query=max(counts),
            rows=counts,
        )
        states = None
        if self.states:
            none, one = full(seqs, -1, torch.int32), full(seqs, 1, torch.int32)
            states = StateBatch(starts, none, none, none, one, max_query=max(counts))
        return StepInputs(
            token_ids=full(tokens, 0),
            positions=full(tokens, 0),
            attention=[attention] * len(self.caches),
            last_rows=starts[1:].long() - 1,
            lora=None,
            states=states,
        )
