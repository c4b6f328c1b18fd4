"""From a config to an :class:`Architecture`, by the family that ``model_type`` names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig

from nybble.models.anatomy.architecture import Architecture
from nybble.models.anatomy.feed_forward import Mixture
from nybble.models.config import UnsupportedModelError, number

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
    _check_numbers(config)
    _check_positions(config)
    try:
        architecture = _families()[config.model_type](config)
    except UnsupportedModelError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What no check has foreseen is still a fault of the config, not of the program.
        raise UnsupportedModelError(
            f"config.json of a {config.model_type} has a value that cannot be computed with "
            f"({type(error).__name__}: {error}){_nulls(config)}"
        ) from error
    if not architecture.attentions:
        raise UnsupportedModelError("no layer has attention, which is not supported")
    for layer in architecture.layers:
        if isinstance(mlp := layer.mlp, Mixture) and not 1 <= mlp.top_k <= len(mlp.experts):
            raise UnsupportedModelError(
                f"a token uses {mlp.top_k} experts, but there are {len(mlp.experts)}"
            )
    return architecture


def _numbers(config: PretrainedConfig) -> Iterator[tuple[str, object]]:
    """The settings that are numbers in a config of this family which says nothing."""
    try:
        usual = type(config)().to_dict()
    except Exception:  # a config class may need more than its defaults
        return
    for name, value in usual.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, getattr(config, name, value)


# Numbers that families read as they are, and that have to be more than 0.
_ABOVE_0 = (
    *("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"),
    *("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"),
    *("lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "logit_scale"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *("routed_scaling_factor", "swiglu_alpha", "swiglu_limit", "block_ffn_dim_multiplier"),
    "mamba_expand",
)


def _check_numbers(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError for a number with which nothing can be computed.

    ``null`` may stand for a default.
    """
    for name in _ABOVE_0:
        if (value := getattr(config, name, None)) is not None:
            number(name, value, above=0.0)
    for name, value in _numbers(config):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        found = number(name, value)
        if name.endswith(("_eps", "_epsilon")) and not 0 <= found < 1:
            raise UnsupportedModelError(f"{name} is {value}, expected 0 or more and less than 1")


def _check_positions(config: PretrainedConfig) -> None:
    """Refuse positions that are not rotary, such as ALiBi, unless the family reads the setting."""
    name = "position_embedding_type"
    value = getattr(config, name, None)
    if value is None or hasattr(type(config), name):
        return
    if not isinstance(value, str) or not value.startswith("rope"):
        raise UnsupportedModelError(
            f"{name} is {value!r}, which is not supported for {config.model_type}; expected 'rope'"
        )


def _nulls(config: PretrainedConfig) -> str:
    """Which of a config's numbers are missing, for an error."""
    names = [name for name, value in _numbers(config) if value is None]
    return f"; null are {', '.join(names)}" if names else ""


def require_family(model_type: object, wrappers: Collection[str] = ()) -> None:
    """Raises UnsupportedModelError for a family that is not known, which names those that are.

    wrappers: model types of which a part is a family that is known.
    """
    if not isinstance(model_type, str) or model_type not in _families():
        lacking = [f" ({what})" for what, types in _LACKING.items() if model_type in types]
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported{''.join(lacking)}; "
            f"supported are {', '.join(supported_families())}"
            + (f"; and the language models of {', '.join(sorted(wrappers))}" if wrappers else "")
        )
