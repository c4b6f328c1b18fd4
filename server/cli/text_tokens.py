"""Tokens to calibrate or to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# Samples and their length, for rounding merged weights.
MERGE_CALIBRATION = (16, 512)


def text_tokens(
    model: Path,
    text: Path | None,
    half: Literal["calibration", "held-out"],
    samples: int,
    length: int,
) -> Tensor:
    """int64 ``(samples, length)`` of the file, or of a half of the standard library."""
    from nybble.quantizers.corpus import standard_library_text, token_windows
    from transformers import AutoTokenizer

    content = standard_library_text(half) if text is None else text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return token_windows(tokenizer, content, samples=samples, length=length)
