"""Runs a scheduled batch through the model: block tables and slots in, logits out."""

from __future__ import annotations

import torch
from nybble.engine.adapter_slots import AdapterSlots
from nybble.engine.config import EngineConfig
from nybble.engine.decoder import Decoder, DecoderShape
from nybble.engine.scheduler import ScheduledBatch
from nybble.kernels.ops import AttentionBatch
from torch import Tensor


def kv_bytes_per_block(shape: DecoderShape, config: EngineConfig) -> int:
    """Bytes one block takes for the keys and values of all layers."""
    values = shape.kv_heads * config.block_size * shape.head_dim
    return 2 * shape.layers * values * config.dtype.itemsize


class ModelRunner:
    """Owns the KV cache tensors and turns scheduled sequences into model inputs."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        num_blocks: int,
        adapters: AdapterSlots | None = None,
    ) -> None:
        shape = decoder.shape
        self.adapters = adapters
        self.decoder = decoder
        self.block_size = config.block_size
        self.device = torch.device(config.device)
        cache_shape = (num_blocks, shape.kv_heads, config.block_size, shape.head_dim)

        def cache() -> Tensor:
            return torch.zeros(cache_shape, dtype=config.dtype, device=self.device)

        self.caches = [(cache(), cache()) for _ in range(shape.layers)]

    def run(self, batch: ScheduledBatch) -> Tensor:
        """Compute every scheduled token.

        Returns float32 logits ``(completing, vocab)``, one row for each scheduled sequence that
        completes, in the order of the batch.
        """
        token_ids: list[int] = []
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        query_start, context_lens, last_rows = [0], [], []
        block_tables = torch.zeros(
            (len(batch), max(len(item.sequence.blocks) for item in batch)), dtype=torch.int32
        )
        for row, item in enumerate(batch):
            sequence, start = item.sequence, item.sequence.num_computed_tokens
            end = start + item.num_tokens
            token_ids += sequence.token_ids[start:end]
            block_tables[row, : len(sequence.blocks)] = torch.tensor(
                sequence.blocks, dtype=torch.int32
            )
            position = torch.arange(start, end)
            positions.append(position)
            block = block_tables[row, position // self.block_size].long()
            slots.append(block * self.block_size + position % self.block_size)
            query_start.append(query_start[-1] + item.num_tokens)
            context_lens.append(end)
            if item.completes:
                last_rows.append(query_start[-1] - 1)
        attention = AttentionBatch(
            query_start=torch.tensor(query_start, dtype=torch.int32).to(self.device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32).to(self.device),
            block_tables=block_tables.to(self.device),
            slot_mapping=torch.cat(slots).to(self.device),
            max_query=max(item.num_tokens for item in batch),
        )
        adapters = None
        if self.adapters is not None:
            adapters = self.adapters.step(
                [item.sequence.adapter_slot for item in batch for _ in range(item.num_tokens)]
            )
        hidden = self.decoder.forward(
            torch.tensor(token_ids).to(self.device),
            torch.cat(positions).to(self.device),
            self.caches,
            attention,
            adapters,
        )
        if not last_rows:
            return torch.empty(0, self.decoder.shape.vocab)
        return self.decoder.logits(hidden[torch.tensor(last_rows).to(self.device)])
