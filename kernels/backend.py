"""The back ends: who computes a model's operations, chosen once for its device and dtype.

Three compute what :mod:`nybble.kernels.reference` defines: that module itself, the C++ kernels of
:mod:`nybble.kernels.cpu` and the Triton kernels of :mod:`nybble.kernels.triton`. A back end takes
every size and falls back to the reference by itself, so callers ask it for an operation and for
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.activation import Activation
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.build import load
from nybble.kernels.cpu.deterministic import deterministic_library
from nybble.kernels.cpu.library import CpuLibrary, library
from nybble.kernels.decoder_layer import DecoderLayer, DecoderLayersKernel
from nybble.kernels.lora import GroupedLoRA, LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.kernels.packed import GroupedKernel, LinearKernel, Weight
from nybble.kernels.reference import TokenChoice
from nybble.kernels.routing import Routing
from nybble.kernels.state_batch import StateBatch


class Backend(Protocol):
    """See the function of the same name in :mod:`nybble.kernels.reference` for each operation."""

    def linear(self, weight: Weight, dtype: torch.dtype) -> LinearKernel:
        """The linear layer with this weight, for inputs of ``dtype``: bound to its kernel once."""
        ...

    def gated_linear(
        self, weight: Weight, activation: Activation, dtype: torch.dtype
    ) -> LinearKernel | None:
        """:meth:`linear` of a fused gate_up_proj and :meth:`gated` of its output in one kernel.

        Returns ``(..., out_features / 2)``. None if no kernel computes both.
        """
        ...

    def decoder_layers(
        self, layers: Sequence[DecoderLayer], dtype: torch.dtype
    ) -> DecoderLayersKernel | None:
        """These layers, one after another, in one call. None if no kernel computes them."""
        ...

    def grouped_linear(self, weights: Sequence[Weight], dtype: torch.dtype) -> GroupedKernel:
        """A linear layer of every expert, all of one size: bound to its kernel once."""
        ...

    def router_logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def choose_experts(
        self, router: Routing, logits: Tensor, top_k: int, correction_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float | None = None
    ) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor: ...

    def rotary_store(
        self,
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
        """Heads of a row must be contiguous."""
        ...

    def paged_attention(
        self,
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
        """Heads of a row must be contiguous."""
        ...

    def latent_store(
        self,
        q: Tensor,
        key: Tensor,
        latents: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        scales: Tensor | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        """Entries of a head and of a row must be contiguous."""
        ...

    def latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        latent_dim: int,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Queries must be contiguous."""
        ...

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, batch: StateBatch
    ) -> Tensor:
        """Channels of a row must be contiguous."""
        ...

    def gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        batch: StateBatch,
    ) -> Tensor: ...

    def state_space_scan(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor,
        g: Tensor,
        state: Tensor,
        batch: StateBatch,
    ) -> Tensor: ...

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
    ) -> Tensor:
        """Entries of a row of the gate must be contiguous."""
        ...

    def lora_add(self, out: Tensor, x: Tensor, slots: LoRASlots, batch: LoRABatch) -> None: ...

    def grouped_lora(self, slots: Tensor, count: int) -> GroupedLoRA | None: ...

    def sample_tokens(self, logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor: ...


def backend_for(
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    activations: Literal["auto", "int8"] = "auto",
) -> Backend:
    """The fastest back end for a model computed in ``dtype`` on ``device``.

    deterministic: one that computes a row alike in every batch, bit for bit.
    activations: ``int8`` for one that multiplies packed weights with activations in 8 bits.
    Raises ValueError if there is none.
    """
    bits: Literal[8, 16] = 8 if activations == "int8" else 16
    if bits == 8 and (device.type != "cpu" or dtype != torch.bfloat16 or library() is None):
        raise ValueError(
            f"activations are int8: the C++ kernels on a CPU compute them, in bfloat16, but the "
            f"device is {device.type}, the dtype {str(dtype).removeprefix('torch.')}"
            + ("" if library() else ", and the kernels cannot run here (the log says why)")
        )
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        # Imported here: Triton exists for Linux only.
        from nybble.kernels.triton import backend
        from nybble.kernels.triton import deterministic as in_one_order

        return in_one_order if deterministic else backend
    if deterministic:
        return deterministic_library(dtype, bits)
    if device.type == "cpu" and (cpu := library()) is not None:
        return cpu if bits == 16 else CpuLibrary(load(), bits)
    return reference
