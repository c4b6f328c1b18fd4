"""What a folder of an adapter says about prompts and sampling, beside PEFT's two files.

Training libraries save the tokenizer with an adapter, whose chat template may be one that the
adapter was trained with, and sometimes a generation config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.loaders.errors import AdapterError
from nybble.loaders.json_file import read_json_object, read_text

TEMPLATE, TOKENIZER, GENERATION = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)
SETTINGS_FILES = (TEMPLATE, TOKENIZER, GENERATION)
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class OwnSettings:
    """An adapter's own settings.

    template: its chat template, or several by name as transformers has them; None for the base's.
    generation: its generation_config.json; None for the base's.
    """

    template: str | Mapping[str, str] | None = None
    generation: Mapping[str, Any] | None = None


def read_own_settings(folder: Path) -> OwnSettings:
    """Raises AdapterError for a file that is too large or has not the form it should have."""
    for name in SETTINGS_FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise AdapterError(f"{path} has over {_MOST_BYTES >> 20} MiB")
    try:
        template = _template(folder)
        path = folder / GENERATION
        generation = read_json_object(path) if path.is_file() else None
    except (ValueError, OSError) as error:
        raise AdapterError(
            f"{error}; mend the file, or have the server use the base model's own "
            "(--no-lora-own-settings)"
        ) from error
    return OwnSettings(template, generation)


def _template(folder: Path) -> str | Mapping[str, str] | None:
    path = folder / TEMPLATE
    if path.is_file():
        return read_text(path)
    path = folder / TOKENIZER
    found = read_json_object(path).get("chat_template") if path.is_file() else None
    if found is None or isinstance(found, str):
        return found or None
    if isinstance(found, list):
        pairs = [(each.get("name"), each.get("template")) for each in found if _is_object(each)]
        if len(pairs) == len(found) and all(isinstance(t, str) for pair in pairs for t in pair):
            return dict(pairs) or None
    raise ValueError(f"{path}: chat_template is neither a text nor a list of named texts")


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
