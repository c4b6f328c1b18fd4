"""What a checkpoint's generation_config.json decides: end tokens and sampling defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.engine.request import ParameterError, SamplingParams

_FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The file's settings; empty where there is none. Raises ValueError where it makes no sense."""
    path = folder / _FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object")
    return settings


def sampling_defaults(settings: dict[str, Any]) -> dict[str, float]:
    """The sampling parameters the model's makers recommend, for requests that name none.

    Without ``do_sample`` they are not meant. Raises ValueError for values out of range.
    """
    if not settings.get("do_sample"):
        return {}
    found = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    try:
        SamplingParams(**found)
    except (ParameterError, TypeError) as error:
        raise ValueError(f"{_FILE}: {error}") from error
    return found


def eos_token_ids(
    settings: dict[str, Any], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """End tokens of the tokenizer, the model config and the generation config together."""
    found: set[int] = set()
    sources = (
        tokenizer.eos_token_id,
        getattr(config, "eos_token_id", None),
        settings.get("eos_token_id"),
    )
    for source in sources:
        if isinstance(source, int):
            found.add(source)
        elif source is not None:
            found.update(source)
    return frozenset(found)
