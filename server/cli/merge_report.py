"""``nybble merge``: names to folders, the merge, and a report of what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.loaders import (
    combine_adapters,
    load_adapter,
    open_checkpoint,
    resolve_adapter,
    resolve_model,
)
from nybble.loaders.adapter_combine import Combination
from nybble.loaders.json_file import read_text
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import architecture_of
from nybble.quantizers import MergedLayer, merge_adapter, merge_divergence
from nybble.quantizers.corpus import MERGE_CALIBRATION, text_tokens, token_ids

_WORST = 5
_TEXT_SAMPLES, _TEXT_LENGTH = 8, 512


@dataclass(frozen=True)
class Calibration:
    """What the rounding error is made small on. text: a file, or None for Python's own sources."""

    text: Path | None
    samples: int = MERGE_CALIBRATION[0]


def merge_and_report(
    base: str,
    adapters: Sequence[str],
    target: Path,
    *,
    format: str | None,
    group_size: int | None,
    weights: Sequence[float] | None,
    combination: Combination,
    keep_16_bits: bool,
    calibration: Calibration | None,
    text: Path | None,
    device: torch.device,
    aliases: Path | None,
) -> None:
    """Merge and print. Raises what the loaders and merge_adapter do."""
    source = resolve_model(base, aliases=aliases)
    checkpoint = open_checkpoint(source)
    architecture = architecture_of(checkpoint.config)
    folders = [resolve_adapter(name) for name in adapters]
    loaded = [load_adapter(folder, architecture) for folder in folders]
    adapter = loaded[0]
    if len(loaded) > 1 or weights is not None:
        weights = [1.0] * len(loaded) if weights is None else weights
        adapter = combine_adapters(loaded, weights, combination=combination)
    written = format or checkpoint.format
    calibration_ids = None
    if calibration is not None and written not in ("none", "bf16") and not keep_16_bits:
        calibration_ids = text_tokens(
            source, calibration.text, "calibration", calibration.samples, MERGE_CALIBRATION[1]
        )
    measured = measured_text(source, text)
    layers = merge_adapter(
        source,
        adapter,
        target,
        format=format,
        group_size=group_size,
        keep_16_bits=keep_16_bits,
        calibration=calibration_ids,
        device=device,
        folder=folders[0] if len(folders) == 1 else None,
    )
    print(f"{target}: {len(layers)} layers merged", flush=True)  # measuring may take minutes
    if layers:
        _print_layers(layers)
    divergence = merge_divergence(source, adapter, target, measured, device=device, progress=True)
    effect = merge_divergence(source, adapter, source, measured, device=device, progress=True)
    where = text or "Python's own sources"
    print(
        f"KL(unmerged ‖ merged) on {len(measured)} tokens of {where}: {divergence:.5f} nats a "
        f"token; without the adapter it is {effect:.5f}"
    )


def measured_text(source: Path, text: Path | None) -> Tensor:
    """The beginning of a file however short, or windows of the held-out sources."""
    if text is None:
        return text_tokens(source, None, "held-out", _TEXT_SAMPLES, _TEXT_LENGTH).flatten()
    tokenizer = load_tokenizer(source)
    ids = token_ids(tokenizer, read_text(text))
    if not len(ids):
        raise ValueError(f"{text} is empty")
    return ids[: _TEXT_SAMPLES * _TEXT_LENGTH]


def _print_layers(layers: Sequence[MergedLayer]) -> None:
    mean = sum(layer.error for layer in layers) / len(layers)
    print(f"rounding error ‖Ŵ − W‖ / ‖W‖ of a layer: mean {mean:.2e}; the worst layers:")
    for layer in sorted(layers, key=lambda layer: layer.error, reverse=True)[:_WORST]:
        print(f"  {layer.name}: {layer.error:.2e}, {layer.relative_to_change:.2g} × the change")
