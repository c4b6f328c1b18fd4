"""Text to calibrate and to measure with, from what every Python installation has.

The standard library's sources (code with English comments and docstrings) and the language
reference that ``help()`` shows (``pydoc_data.topics``: English prose), all under the Python
Software Foundation licence. Documents are dealt to two halves that share none.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Half = Literal["calibration", "held-out"]

_SEED = 0
_SHORTEST = 2000  # characters


def standard_library_text(half: Half) -> str:
    """The documents of one half in a fixed random order; which ones depends on Python's version.

    Raises FileNotFoundError where the installation has no sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    # The folders of modules people read: no tests, no tables, nothing generated or installed.
    files = [*folder.glob("*.py"), *(folder / "asyncio").glob("*.py"), *folder.glob("json/*.py")]
    documents = [path.read_text(encoding="utf-8") for path in sorted(files)]
    documents += [topics[name] for name in sorted(topics)]
    documents = [document for document in documents if len(document) >= _SHORTEST]
    if len(documents) < 2:
        raise FileNotFoundError(
            f"{folder} has no sources of Python's standard library; give a text file instead"
        )
    random.Random(_SEED).shuffle(documents)
    return "\n\n".join(documents[half == "held-out" :: 2])


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, samples: int, length: int
) -> Tensor:
    """int64 ``(samples, length)``: windows at random places of the tokenized ``text``.

    Windows do not overlap. Raises ValueError where the text is too short for them.
    """
    ids = token_ids(tokenizer, text)
    windows = len(ids) // length
    if windows < samples:
        raise ValueError(
            f"the text has {len(ids)} tokens, {samples} samples of {length} were asked for"
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(_SEED))
    return ids[: windows * length].view(windows, length)[order[:samples]]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 ``(tokens,)``, without the tokens a prompt would begin or end with."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"])
