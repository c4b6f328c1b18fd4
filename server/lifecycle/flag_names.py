"""The flags of settings that the engine calls by names of its own, as errors are to name them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from nybble.engine import AdapterConfig, EngineConfig

# Settings whose flags have other names, or which are words that messages have otherwise too.
_OTHERS = {
    "device_bytes": "--lora-device-memory",
    "draft_model": "--draft-model",
    "draft_quantize": "--draft-quantize",
    "host_bytes": "--lora-host-memory",
    "kv_cache_bytes": "--kv-cache-memory",
    "kv_dtype": "--kv-cache-dtype",
    "max_rank": "--max-lora-rank",
    "on_engine_failure": "--on-engine-failure",
    "speculate is": "--speculate is",
}


def in_flags(error: object) -> str:
    """An error's message with the names of flags instead of those of settings."""
    names = {field.name for settings in (EngineConfig, AdapterConfig) for field in fields(settings)}
    flags = {name: f"--{name.replace('_', '-')}" for name in names if "_" in name} | _OTHERS
    return re.sub(rf"\b({'|'.join(flags)})\b", lambda found: flags[found[0]], str(error))


@contextmanager
def flags_named() -> Iterator[None]:
    """Replace the engine's setting names in errors by the names of the flags."""
    try:
        yield
    except ValueError as error:
        error.args = (in_flags(error),)
        raise
