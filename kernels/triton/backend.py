"""The Triton kernels as a back end: :class:`nybble.kernels.backend.Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nybble.kernels.activation import Activation
from nybble.kernels.packed import DenseWeight, GroupedKernel, LinearKernel, Weight
from nybble.kernels.reference import choose_experts, decoder_layers
from nybble.kernels.reference import packed_matmul as reference_matmul
from nybble.kernels.triton.activation import gated
from nybble.kernels.triton.attention import paged_attention
from nybble.kernels.triton.attention_latent import latent_attention
from nybble.kernels.triton.grouped import StackedExperts, grouped_matmul
from nybble.kernels.triton.grouped import takes as experts_kernel_takes
from nybble.kernels.triton.latent import latent_store
from nybble.kernels.triton.lora import grouped_lora, lora_add
from nybble.kernels.triton.matmul import packed_matmul, takes
from nybble.kernels.triton.norm import add_rms_norm, rms_norm
from nybble.kernels.triton.recurrent import gated_delta_rule, short_convolution
from nybble.kernels.triton.rotary import rotary_store
from nybble.kernels.triton.sampling import sample_tokens
from nybble.kernels.triton.state_space import gated_rms_norm, state_space_scan

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
    if isinstance(weight, DenseWeight):
        return partial(torch.nn.functional.linear, weight=weight.weight, bias=weight.bias)
    return partial(packed_matmul if takes(weight, dtype) else reference_matmul, weight=weight)


def grouped_linear(weights: Sequence[Weight], dtype: torch.dtype) -> GroupedKernel:
    """A linear layer of every expert, for inputs of ``dtype``.

    Raises ValueError for experts that the kernel does not take: the reference would wait for the
    host in every layer.
    """
    if not all(map(experts_kernel_takes, weights)):
        raise ValueError(
            "a GPU computes experts in 16 bits, or in 4 bits in groups of a multiple of 32 inputs; "
            "others run on the CPU only so far. Use --quantize nf4, or --device cpu"
        )
    return partial(grouped_matmul, experts=StackedExperts.of(weights))


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`nybble.kernels.reference.router_logits`; in float32, by the vendor's library."""
    return torch.nn.functional.linear(x.float(), weight, bias)


def gated_linear(weight: Weight, activation: Activation, dtype: torch.dtype) -> LinearKernel | None:
    """The linear layer and its gate in one kernel; None for a weight not in ``gpu_gated_tiles``."""
    if isinstance(weight, DenseWeight) or weight.layout != "gpu_gated_tiles":
        return None
    if not takes(weight, dtype):
        return None
    return partial(packed_matmul, weight=weight, activation=activation)
