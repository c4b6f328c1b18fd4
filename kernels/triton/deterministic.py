"""The Triton kernels whose sums have one order, as a back end.

A row's result is the same in any batch, bit for bit. What :mod:`nybble.kernels.triton.backend`
computes so anyway is taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from nybble.kernels.activation import Activation
from nybble.kernels.packed import DenseWeight, GroupedKernel, LinearKernel, Weight
from nybble.kernels.triton.attention_fixed import paged_attention
from nybble.kernels.triton.backend import (
    add_rms_norm,
    choose_experts,
    decoder_layers,
    gated,
    gated_delta_rule,
    gated_rms_norm,
    grouped_lora,
    latent_attention,
    latent_store,
    lora_add,
    rms_norm,
    rotary_store,
    router_logits,
    sample_tokens,
    short_convolution,
    state_space_scan,
)
from nybble.kernels.triton.fixed_order import fixed_order_matmul
from nybble.kernels.triton.matmul import takes

__all__ = [
    "add_rms_norm",
    "choose_experts",
    "decoder_layers",
    "gated",
    "gated_delta_rule",
    "gated_linear",
    "gated_rms_norm",
    "grouped_linear",
    "grouped_lora",
    "latent_attention",
    "latent_store",
    "linear",
    "lora_add",
    "paged_attention",
    "rms_norm",
    "rotary_store",
    "router_logits",
    "sample_tokens",
    "short_convolution",
    "state_space_scan",
]


def linear(weight: Weight, dtype: torch.dtype) -> LinearKernel:
    """The linear layer with this weight, for inputs of ``dtype``."""
    return partial(fixed_order_matmul, weight=weight)


def gated_linear(weight: Weight, activation: Activation, dtype: torch.dtype) -> LinearKernel | None:
    """The linear layer and its gate in one kernel; None for a weight not in ``gpu_gated_tiles``."""
    if isinstance(weight, DenseWeight) or weight.layout != "gpu_gated_tiles":
        return None
    return (
        partial(fixed_order_matmul, weight=weight, activation=activation)
        if takes(weight, dtype)
        else None
    )


def grouped_linear(weights: Sequence[Weight], dtype: torch.dtype) -> GroupedKernel:
    """Raises ValueError: the products of experts and of their router have no such kernels."""
    raise ValueError(
        "deterministic: a GPU computes mixtures of experts in an order that depends on the batch; "
        "turn deterministic off, or choose the device cpu"
    )
