"""End tokens and sampling defaults from a checkpoint's generation_config.json.

The file is checked when the model is loaded. Forms that mean the same are taken: whole numbers
written as ``20.0``, ``null`` for a setting left out, ``top_k: -1`` for no limit, ``eos_token_id:
-1`` for none. Everything else that does not fit is refused by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.engine.request import ParameterError, SamplingParams
from nybble.loaders.json_file import read_json_object

logger = logging.getLogger(__name__)

_FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The file's settings; empty if there is no file. Raises ValueError if it is invalid."""
    path = folder / _FILE
    return read_json_object(path) if path.is_file() else {}


def sampling_defaults(settings: Mapping[str, Any]) -> dict[str, float]:
    """The sampling parameters the model's makers recommend, for requests that name none.

    Without ``do_sample`` transformers does not use them, and neither does this. They are checked
    all the same: someone meant them. Raises ValueError naming a
    setting of the wrong type or out of range.
    """
    samples = settings.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise ValueError(f"{_FILE}: do_sample is {samples!r}, expected true or false")
    found: dict[str, float] = {}
    for name in _SAMPLING:
        value = settings.get(name)
        if value is None:
            continue
        whole = name == "top_k"
        number = _whole(value) if whole else _number(value)
        if number is None:
            expected = "a whole number" if whole else "a number"
            raise ValueError(f"{_FILE}: {name} is {value!r}, expected {expected}")
        found[name] = number
    try:
        params = SamplingParams(**found)  # type: ignore[arg-type]
    except ParameterError as error:
        raise ValueError(f"{_FILE}: {error}") from error
    return {name: getattr(params, name) for name in found} if samples else {}


def eos_token_ids(
    settings: dict[str, Any],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
) -> frozenset[int]:
    """End tokens of the tokenizer, the model config and the generation config together.

    vocab: tokens the model can say. One beyond never comes, and is left out with a warning. Raises
    ValueError naming the source of what is no token id.
    """
    sources = {
        "the tokenizer's eos_token_id": tokenizer.eos_token_id,
        "eos_token_id in config.json": getattr(config, "eos_token_id", None),
        f"eos_token_id in {_FILE}": settings.get("eos_token_id"),
    }
    found: set[int] = set()
    for source, value in sources.items():
        for token in _token_ids(source, value):
            if 0 <= token < vocab:
                found.add(token)
            elif token != -1:
                logger.warning(
                    "%s is %d, outside the vocabulary of %d, and left out", source, token, vocab
                )
    return frozenset(found)


def own_end_tokens(settings: Mapping[str, Any], vocab: int) -> frozenset[int]:
    """The end tokens that a generation config names. Raises ValueError if they are no token ids."""
    found = _token_ids(f"eos_token_id in {_FILE}", settings.get("eos_token_id"))
    return frozenset(token for token in found if 0 <= token < vocab)


def _token_ids(source: str, value: Any) -> Iterator[int]:
    for each in value if isinstance(value, list | tuple) else [value]:
        if each is None:
            continue
        token = _whole(each)
        if token is None:
            raise ValueError(f"{source} is {value!r}, expected a token id or a list of them")
        yield token


def _number(value: Any) -> float | None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if right else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number != int(number) else int(number)
