"""The adapters that a start is told to load: names and where they are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from nybble.server.adapters.names import require_name
from nybble.server.lifecycle.options import AdapterOptions


def named_adapters(options: AdapterOptions, models: Sequence[str]) -> dict[str, str]:
    """Paths of ``--lora-modules`` by name. Raises ValueError for a name that is taken,
    or that no adapter may have."""
    adapters: dict[str, str] = {}
    for option in options.lora_modules or ():
        name, path = _named_adapter(option)
        if name in adapters:
            raise ValueError(f"--lora-modules: two adapters are called {name!r}")
        if name in models:
            raise ValueError(f"--lora-modules: {name!r} is the name of the base model")
        adapters[name] = path
    return adapters


def _named_adapter(option: str) -> tuple[str, str]:
    """Name and path: ``NAME=PATH``, or JSON as in vLLM, ``{"name": …, "path": …}``."""
    if option.startswith("{"):
        try:
            found = json.loads(option)
            name, path = found["name"], found["path"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--lora-modules {option!r}: expected a JSON object with name and path ({error!r})"
            ) from None
    else:
        name, _, path = option.partition("=")
    if not (isinstance(name, str) and isinstance(path, str) and name and path):
        raise ValueError(f"--lora-modules {option!r}: expected NAME=PATH")
    try:
        return require_name(name), path
    except ValueError as error:
        raise ValueError(f"--lora-modules: {error}") from None
