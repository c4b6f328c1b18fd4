"""Reading a transformers config: sizes are checked, unsupported settings refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from nybble.kernels.activation import Activation
from nybble.models.anatomy.linears import Rope

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


# No model has as many of anything as the second.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 10_000,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 100_000),
}
_MOST_OF_ANY = 2**31 - 1


class UnsupportedModelError(ValueError):
    """The model's family, or a setting in its config.json, is not supported."""


def size(config: PretrainedConfig, name: str, *, least: int = 1) -> int:
    """The setting ``name``, a whole number of at least 1, or of ``least``."""
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UnsupportedModelError(f"{name} is {value!r}, expected {least} or more")
    most = _MOST.get(name, _MOST_OF_ANY)
    if value > most:
        raise UnsupportedModelError(f"{name} is {value}, expected {most:,} or less")
    return value


def number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf
) -> float:
    """A setting's ``value``: a finite number, more than ``above`` and at least ``least``.

    Raises UnsupportedModelError, which names the setting.
    """
    bounds = "a finite number"
    if above > -math.inf:
        bounds += f" above {above:g}"
    elif least > -math.inf:
        bounds += f" of {least:g} or more"
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value <= above
        or value < least
    ):
        raise UnsupportedModelError(f"{name} is {value!r}, expected {bounds}")
    return float(value)


def head_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim)."""
    heads, kv_heads = size(config, "num_attention_heads"), size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        hidden = size(config, "hidden_size")
        if hidden < heads:
            raise UnsupportedModelError(
                f"hidden_size {hidden} is less than num_attention_heads {heads}"
            )
        return heads, kv_heads, hidden // heads
    return heads, kv_heads, size(config, "head_dim")


def activation(config: PretrainedConfig, name: str = "hidden_act") -> Activation:
    """The activation that the setting ``name`` calls for."""
    value = getattr(config, name)
    if value not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name} is {value!r}; supported are {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[value]


def refuse(config: PretrainedConfig, **neutral: object) -> None:
    """Refuse settings that have another value than the one this family computes; None is unset."""
    for name, value in neutral.items():
        found = getattr(config, name, value)
        if isinstance(found, list):  # as JSON has a tuple
            found = tuple(found)
        if found is not None and found != value:
            raise UnsupportedModelError(
                f"{name} is {found!r}, which is not supported for {config.model_type}; "
                f"expected {value!r}"
            )


def windows(config: PretrainedConfig) -> tuple[int, ...]:
    """Each layer's window by ``layer_types`` and ``sliding_window``; 0 for layers that see all."""
    kinds = layer_types(config, "sliding_attention", "full_attention")
    unset = getattr(config, "sliding_window", None) is None
    if "sliding_attention" not in kinds or (unset and not getattr(config, "layer_types", None)):
        return (0,) * len(kinds)
    window = size(config, "sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def layer_types(config: PretrainedConfig, *supported: str) -> tuple[str, ...]:
    """Each layer's kind, one of ``supported``, by ``layer_types``; the first if that is not set."""
    layers = size(config, "num_hidden_layers")
    kinds = getattr(config, "layer_types", None) or supported[:1] * layers
    for kind in kinds:
        if kind not in supported:
            raise UnsupportedModelError(
                f"layer_types has {kind!r}; supported are {' and '.join(supported)}"
            )
    if len(kinds) != layers:
        raise UnsupportedModelError(
            f"layer_types has {len(kinds)} entries, but num_hidden_layers is {layers}"
        )
    return tuple(kinds)


# Of what scales frequencies, with the least that each may be; None: more than 0.
_ROPE_NUMBERS: dict[str, float | None] = {
    "rope_theta": None,
    "factor": 1.0,
    "attention_factor": None,
    "beta_fast": None,
    "beta_slow": None,
    "low_freq_factor": None,
    "high_freq_factor": None,
    "original_max_position_embeddings": 1.0,
    "partial_rotary_factor": None,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
}
# What each kind cannot do without.
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope(
    config: PretrainedConfig,
    head_dim: int,
    *,
    layer_type: str | None = None,
    interleaved: bool = False,
    includes_scaling: bool = False,
) -> Rope:
    """The rotary embedding of the layers of ``layer_type``, or of all layers.

    Raises UnsupportedModelError for a kind of scaling that nothing here computes.
    """
    parameters: Mapping[str, Any] = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    parameters = dict(parameters)
    kind = parameters.get("rope_type")
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope_type is {kind!r}; supported are {', '.join(_ROPE_TYPES)}"
        )
    _check_rope(kind, parameters)
    factor = parameters.pop("partial_rotary_factor", None) or 1.0
    rotary_dim = int(head_dim * factor)
    if not 0 < rotary_dim <= head_dim:
        raise UnsupportedModelError(
            f"partial_rotary_factor of rope_parameters is {factor}, expected 1 or less, and enough "
            f"for one of {head_dim} entries"
        )
    for name in ("short_factor", "long_factor"):
        if kind == "longrope":
            _check_factors(name, parameters[name], rotary_dim // 2)
    return Rope(
        rotary_dim=rotary_dim,
        parameters=parameters,
        max_position_embeddings=size(config, "max_position_embeddings"),
        interleaved=interleaved,
        includes_scaling=includes_scaling,
    )


def _check_rope(kind: str, parameters: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError for numbers with which no frequencies can be computed."""
    for name in ("rope_theta", *_ROPE_NEEDS.get(kind, ())):
        if parameters.get(name) is None:
            raise UnsupportedModelError(f"rope_parameters has no {name}, which {kind} needs")
    for name, least in _ROPE_NUMBERS.items():
        if (value := parameters.get(name)) is not None:
            own = f"{name} of rope_parameters"
            if least is None:
                number(own, value, above=0.0)
            else:
                number(own, value, least=least)
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        if high <= low:
            raise UnsupportedModelError(
                f"high_freq_factor of rope_parameters is {high}, expected more than "
                f"low_freq_factor, {low}"
            )


def _check_factors(name: str, values: object, count: int) -> None:
    """Raises UnsupportedModelError for anything but ``count`` numbers above 0."""
    if not isinstance(values, list | tuple) or len(values) != count:
        length = f"{len(values)} entries" if isinstance(values, list | tuple) else repr(values)
        raise UnsupportedModelError(
            f"{name} of rope_parameters has {length}, expected {count} numbers"
        )
    for value in values:
        number(f"an entry of {name} of rope_parameters", value, above=0.0)
