"""The activations of an MLP, by name."""

from __future__ import annotations

from typing import Literal, get_args

# In order: x / (1 + e⁻ˣ); x · Φ(x) with the normal distribution function Φ, exact or approximated
# by tanh (Hendrycks and Gimpel 2016); max(x, 0)² (So et al. 2021).
Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def check_activation(name: str) -> None:
    """Raises ValueError if ``name`` is not an :data:`Activation`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
