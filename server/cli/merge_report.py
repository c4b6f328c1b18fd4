"""``nybble merge``: names to folders, the merge, and a report of what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from nybble.loaders import (
    combine_adapters,
    load_adapter,
    open_checkpoint,
    resolve_adapter,
    resolve_model,
)
from nybble.loaders.adapter import projection_shapes
from nybble.loaders.adapter_combine import Combination
from nybble.quantizers import MergedLayer, merge_adapter, merge_divergence
from nybble.quantizers.formats import Format
from transformers import AutoTokenizer

_WORST = 5
_TEXT_TOKENS = 4096


def merge_and_report(
    base: str,
    adapters: Sequence[str],
    target: Path,
    *,
    format: Format | Literal["bf16"] | None,
    weights: Sequence[float] | None,
    combination: Combination,
    keep_16_bits: bool,
    text: Path | None,
    aliases: Path | None,
) -> None:
    """Merge and print. Raises what the loaders and merge_adapter do."""
    source = resolve_model(base, aliases=aliases)
    shapes = projection_shapes(open_checkpoint(source).config)
    loaded = [load_adapter(resolve_adapter(name), shapes) for name in adapters]
    adapter = loaded[0]
    if len(loaded) > 1 or weights is not None:
        weights = [1.0] * len(loaded) if weights is None else weights
        adapter = combine_adapters(loaded, weights, combination=combination)
    layers = merge_adapter(source, adapter, target, format=format, keep_16_bits=keep_16_bits)
    print(f"{target}: {len(layers)} layers merged")
    _print_layers(layers)
    if text is not None:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        ids = torch.tensor(tokenizer(text.read_text())["input_ids"][:_TEXT_TOKENS])
        if not len(ids):
            raise ValueError(f"{text} is empty")
        divergence = merge_divergence(source, adapter, target, ids)
        effect = merge_divergence(source, adapter, source, ids)
        print(
            f"KL(unmerged ‖ merged) on {len(ids)} tokens of {text}: {divergence:.5f} nats a token; "
            f"without the adapter it is {effect:.5f}"
        )


def _print_layers(layers: Sequence[MergedLayer]) -> None:
    mean = sum(layer.error for layer in layers) / len(layers)
    print(f"rounding error ‖Ŵ − W‖ / ‖W‖: mean {mean:.2e}; the worst layers:")
    for layer in sorted(layers, key=lambda layer: layer.error, reverse=True)[:_WORST]:
        print(f"  {layer.name}: {layer.error:.2e}, {layer.relative_to_change:.2g} × the change")
