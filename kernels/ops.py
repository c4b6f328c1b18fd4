"""The operations between the matmuls: each picks the fastest kernel its inputs allow.

They compute what :mod:`nybble.kernels.reference` defines. On a GPU the Triton kernels take float16
and bfloat16 of any size; the CPU kernels take bfloat16 with sizes that are multiples of their
vectors; anything else goes to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.activation import Activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.library import CpuLibrary, library
from nybble.kernels.reference import TokenChoice, activate, add_layer_norm, layer_norm

__all__ = [
    "Activation",
    "AttentionBatch",
    "TokenChoice",
    "activate",
    "add_layer_norm",
    "add_rms_norm",
    "gated",
    "layer_norm",
    "paged_attention",
    "rms_norm",
    "rotary_store",
    "sample_tokens",
]


def _cpu(width: int, multiple: int, *tensors: Tensor) -> CpuLibrary | None:
    """The CPU kernels if they take these tensors and ``width`` is a multiple of ``multiple``."""
    if width % multiple:
        return None
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or not tensor.is_cpu:
            return None
    return library()


def _stored(*caches: Tensor) -> list[Tensor]:
    """The caches which the CPU kernels take only in bfloat16: they take int8 with scales too."""
    return [cache for cache in caches if cache.dtype != torch.int8]


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``. Callers import Triton only then: CPUs do without."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """See :func:`nybble.kernels.reference.rms_norm`."""
    if _on_gpu(x):
        from nybble.kernels.triton import norm

        return norm.rms_norm(x, weight, eps, offset)
    cpu = _cpu(x.shape[-1], 16, x, weight)
    return (cpu or reference).rms_norm(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See :func:`nybble.kernels.reference.add_rms_norm`."""
    if _on_gpu(x):
        from nybble.kernels.triton import norm

        return norm.add_rms_norm(x, residual, weight, eps, offset)
    cpu = _cpu(x.shape[-1], 16, x, residual, weight)
    return (cpu or reference).add_rms_norm(x, residual, weight, eps, offset)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """See :func:`nybble.kernels.reference.gated`."""
    if _on_gpu(gate_up):
        from nybble.kernels.triton import activation as gpu

        return gpu.gated(gate_up, activation)
    cpu = _cpu(gate_up.shape[-1], 32, gate_up)
    return (cpu or reference).gated(gate_up, activation)


def rotary_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    """See :func:`nybble.kernels.reference.rotary_store`. Heads of a row must be contiguous."""
    inputs = q, k, v, cos, sin, k_cache, v_cache, slot_mapping
    if _on_gpu(q):
        from nybble.kernels.triton import rotary

        kernel = rotary.rotary_store
    else:
        cpu = _cpu(q.shape[-1], 16, q, k, v, *_stored(k_cache, v_cache))
        kernel = (cpu or reference).rotary_store
    kernel(*inputs, k_scales, v_scales, interleaved=interleaved)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`nybble.kernels.reference.paged_attention`. Heads of a row must be contiguous."""
    inputs = q, k_cache, v_cache, batch, scale, window
    if _on_gpu(q):
        from nybble.kernels.triton import attention

        kernel = attention.paged_attention
    else:
        cpu = _cpu(q.shape[-1], 16, q, *_stored(k_cache, v_cache))
        kernel = (cpu or reference).paged_attention
    return kernel(*inputs, k_scales, v_scales, softcap=softcap, sinks=sinks)


def sample_tokens(logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """See :func:`nybble.kernels.reference.sample_tokens`."""
    if all(choice.temperature == 0 for choice in choices):
        return logits.argmax(-1)
    if logits.is_cuda:
        from nybble.kernels.triton import sampling

        return sampling.sample_tokens(logits, choices)
    cpu = library() if logits.is_cpu else None
    return (cpu or reference).sample_tokens(logits, choices)
