"""Text for calibration and evaluation that every Python installation has.

The standard library's sources (code with English comments and docstrings) and the language
reference that ``help()`` shows (``pydoc_data.topics``: English prose), all under the Python
Software Foundation licence. They are divided into three parts: one to calibrate and train on, one
to choose methods by, one to report results on. A package lies within one part, and no line of more
than 30 characters occurs twice, within a part or across parts.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.loaders.json_file import read_text
from nybble.loaders.tokenizer import load_tokenizer

Part = Literal["calibration", "validation", "held-out"]

# Units are assigned in turn to four places; each part has some of them.
_PLACES: dict[Part, tuple[int, ...]] = {
    "calibration": (0, 2),
    "validation": (1,),
    "held-out": (3,),
}
# Packages of readable source: no tests, no tables, nothing generated or installed.
_PACKAGES = (
    *("asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib"),
    *("json", "logging", "multiprocessing", "unittest", "urllib", "xmlrpc"),
)
# Samples and their length, for rounding merged weights.
MERGE_CALIBRATION = (16, 512)
_SEED = 0
_SHORTEST = 2000  # characters of a document
_LONG_LINE = 30  # characters; shorter ones are idioms of the language


def standard_library_text(part: Part) -> str:
    """The documents of a part in a fixed random order; which ones depends on Python's version.

    Raises FileNotFoundError if the installation has no sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    units = [[topics[name]] for name in sorted(topics)]
    groups = [[file] for file in sorted(folder.glob("*.py"))]
    groups += [sorted((folder / package).glob("*.py")) for package in _PACKAGES]
    units += [[file.read_text(encoding="utf-8") for file in group] for group in groups]
    units = [[text for text in unit if len(text) >= _SHORTEST] for unit in units]
    units = [unit for unit in units if unit]
    random.Random(_SEED).shuffle(units)
    dealt: dict[int, list[str]] = {place: [] for place in range(4)}
    for index, unit in enumerate(_without_repetition(units)):
        dealt[index % 4] += unit
    text = "\n\n".join(document for place in _PLACES[part] for document in dealt[place])
    if not text:
        raise FileNotFoundError(
            f"{folder} has no sources of Python's standard library; give a text file instead"
        )
    return text


def _without_repetition(units: list[list[str]]) -> Iterator[list[str]]:
    """The units without long lines that occurred before: licences, text that topics share."""
    seen: set[str] = set()
    for unit in units:
        documents = []
        for document in unit:
            kept = []
            for line in document.splitlines():
                if len(line.strip()) > _LONG_LINE:
                    if line.strip() in seen:
                        continue
                    seen.add(line.strip())
                kept.append(line)
            documents.append("\n".join(kept))
        yield documents


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, samples: int, length: int
) -> Tensor:
    """int64 ``(samples, length)``: windows at random places of the tokenized ``text``.

    Windows do not overlap. Raises ValueError if the text is too short for them.
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


def text_tokens(
    model: Path, text: Path | None, part: Part, samples: int, length: int, *, running: bool = False
) -> Tensor:
    """int64 ``(samples, length)`` of the file, or of a part of the standard library.

    model: the folder of the tokenizer.
    running: take windows in order from the text's beginning; otherwise at random places.
    Raises ValueError if the text is too short or not in UTF-8.
    """
    content = standard_library_text(part) if text is None else read_text(text)
    tokenizer = load_tokenizer(model)
    if not running:
        return token_windows(tokenizer, content, samples=samples, length=length)
    ids = token_ids(tokenizer, content)[: samples * length]
    if len(ids) < samples * length:
        raise ValueError(f"the text has {len(ids)} tokens, {samples * length} were asked for")
    return ids.view(samples, length)
