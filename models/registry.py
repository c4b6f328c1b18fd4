"""From a config to an :class:`Architecture`, by the family that ``model_type`` names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig

from nybble.models.anatomy.architecture import Architecture
from nybble.models.config import UnsupportedModelError

Describe = Callable[[PretrainedConfig], Architecture]
# Modules of this package that describe no family.
_SHARED = ("anatomy", "config", "eagle3", "parts", "registry")
# Layers that nothing here computes, and model types that have them: nothing less would serve these.
_LACKING = {
    "latent attention in layouts of their own": ("deepseek_v32", "kimi_linear", "longcat_flash"),
    "state spaces in layouts of their own": ("jamba", "mamba", "mamba2", "zamba2"),
}


@cache
def _families() -> dict[str, Describe]:
    """Every module's ``FAMILIES``, which maps a model_type to the function that describes it."""
    families: dict[str, Describe] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in _SHARED:
            found = importlib.import_module(f"nybble.models.{module.name}")
            families.update(found.FAMILIES)
    return families


def supported_families() -> list[str]:
    """The model types that can be loaded, in alphabetical order."""
    return sorted(_families())


def architecture_of(config: PretrainedConfig) -> Architecture:
    """What a model with this config is made of.

    Raises UnsupportedModelError naming the family or setting that is not supported.
    """
    require_family(config.model_type)
    architecture = _families()[config.model_type](config)
    if not architecture.attentions:
        raise UnsupportedModelError("no layer has attention, which is not supported")
    return architecture


def require_family(model_type: object) -> None:
    """Raises UnsupportedModelError for a family that is not known, which names those that are."""
    if not isinstance(model_type, str) or model_type not in _families():
        lacking = [f" ({what})" for what, types in _LACKING.items() if model_type in types]
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported{''.join(lacking)}; "
            f"supported are {', '.join(supported_families())}"
        )
