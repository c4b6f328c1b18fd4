"""Tokens to calibrate or to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from nybble.quantizers.corpus import Part

# Samples and their length, for rounding merged weights.
MERGE_CALIBRATION = (16, 512)


def text_tokens(
    model: Path, text: Path | None, part: Part, samples: int, length: int, *, running: bool = False
) -> Tensor:
    """int64 ``(samples, length)`` of the file, or of a part of the standard library.

    running: from the text's beginning on; otherwise from places all over it.
    """
    from transformers import AutoTokenizer

    from nybble.quantizers.corpus import standard_library_text, token_ids, token_windows

    content = standard_library_text(part) if text is None else text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not running:
        return token_windows(tokenizer, content, samples=samples, length=length)
    ids = token_ids(tokenizer, content)[: samples * length]
    if len(ids) < samples * length:
        raise ValueError(f"the text has {len(ids)} tokens, {samples * length} were asked for")
    return ids.view(samples, length)
