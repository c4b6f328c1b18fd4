"""Reading a transformers config: sizes are checked, unsupported settings refused by name."""

from __future__ import annotations

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


class UnsupportedModelError(ValueError):
    """The model's family, or a setting in its config.json, is not supported."""


def size(config: PretrainedConfig, name: str) -> int:
    """The setting ``name``, a whole number of at least 1."""
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(f"{name} is {value!r}, expected 1 or more")
    return value


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
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = layer_types(config, "sliding_attention", "full_attention")
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
    factor = parameters.pop("partial_rotary_factor", None) or 1.0
    return Rope(
        rotary_dim=int(head_dim * factor),
        parameters=parameters,
        max_position_embeddings=size(config, "max_position_embeddings"),
        interleaved=interleaved,
        includes_scaling=includes_scaling,
    )
