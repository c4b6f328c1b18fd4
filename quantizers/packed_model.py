"""A checkpoint as a transformers model whose linear layers compute with packed 4-bit weights.

For evaluation and training. Gradients flow through the weights to the inputs; the weights get none,
and no full-precision copy of them exists. Serving has its own decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.cpu.build import multiplies_bfloat16
from nybble.kernels.matmul import dequantize, packed_matmul, preferred_layout
from nybble.loaders import Checkpoint, CheckpointError
from nybble.models import architecture_of
from nybble.quantizers.skeleton import model_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows dequantized at a time in the backward pass; a multiple of every layout's tile.
_ROWS_AT_A_TIME = 1024


class _PackedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return packed_matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad,) = grads
        weight: PackedWeight = ctx.weight
        total = grad.new_zeros(*grad.shape[:-1], weight.in_features, dtype=torch.float32)
        for start in range(0, weight.out_features, _ROWS_AT_A_TIME):
            rows = weight.rows(start, start + _ROWS_AT_A_TIME)
            part = grad[..., start : start + rows.out_features]
            total += part @ dequantize(rows, grad.dtype)
        return total.to(grad.dtype), None


def packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """:func:`nybble.kernels.matmul.packed_matmul` with a gradient for ``x``, dX = dY · W.

    The weight is dequantized a few rows at a time; it and its bias get no gradient.
    """
    result: Tensor = _PackedMatmul.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class PackedLinear(nn.Module):
    """A linear layer with a packed weight: no parameters, nothing to train."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.packed = weight
        self.in_features = weight.in_features
        self.out_features = weight.out_features

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed)


@dataclass(frozen=True)
class OutputLayer:
    """From final hidden states to float32 logits, scaled and capped as the model's.

    head: the linear layer.
    multiplier: of its outputs.
    softcap: what they stay below; None for no limit.
    """

    head: nn.Module
    multiplier: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputLayer:
        about = architecture_of(model.config)
        head = model.get_submodule(about.head)
        return cls(head, about.logits_multiplier, about.logits_softcap)

    @property
    def vocab(self) -> int:
        return int(self.head.out_features)  # type: ignore[arg-type]

    def __call__(self, hidden: Tensor) -> Tensor:
        """``(rows, vocab)`` for ``(rows, hidden)``."""
        logits: Tensor = self.head(hidden).float()
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def training_dtype(device: torch.device) -> torch.dtype:
    """The dtype of activations in which PyTorch trains fastest: bfloat16, or float32 on a CPU that
    does not multiply bfloat16 itself.
    """
    native = device.type != "cpu" or multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def load_packed_model(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """transformers' model for ``checkpoint``, every parameter frozen; 16-bit layers stay 16-bit.

    Raises CheckpointError if the checkpoint and the architecture do not match.
    """
    config = type(checkpoint.config).from_dict(
        {**checkpoint.config.to_dict(), "quantization_config": None}
    )
    config.dtype = dtype
    model = model_skeleton(config)
    architecture = architecture_of(config)
    parts = dict(architecture.fused.values())
    layout = preferred_layout(device)
    loaded: set[str] = set()

    def set_parameter(name: str, value: Tensor) -> None:
        _set_parameter(model, name, value.to(device, dtype))
        loaded.add(name)

    tied = True
    for name, weight in checkpoint.weights():
        tied &= name != architecture.head
        if isinstance(weight, Tensor):
            set_parameter(name, weight)
            continue
        for module, part in _unfused(model, parts.get(name, (name,)), weight):
            if type(model.get_submodule(module)) is not nn.Linear:  # a router
                exact = part.dequantize() if isinstance(part, PackedWeight) else part.weight
                set_parameter(module + ".weight", exact)
            elif isinstance(part, PackedWeight):
                bias = None if part.bias is None else part.bias.to(dtype)
                packed = replace(part, bias=bias).to_layout(layout).to(device)
                model.set_submodule(module, PackedLinear(packed))
            else:
                set_parameter(module + ".weight", part.weight)
                if part.bias is not None:
                    set_parameter(module + ".bias", part.bias)
    if tied:
        model.tie_weights()
    else:  # a file may have an output layer of its own whatever its config says
        model.config.tie_word_embeddings = False
    missing = [name for name, _ in model.named_parameters() if name not in loaded]
    if missing:
        raise CheckpointError(f"{checkpoint.folder} has no {missing[0]}")
    nn.Module.to(model, device)  # buffers that are computed, not loaded: rotary frequencies
    model.requires_grad_(False)
    model.train(False)
    return model


def _unfused(
    model: PreTrainedModel, modules: Sequence[str], weight: PackedWeight | DenseWeight
) -> list[tuple[str, PackedWeight | DenseWeight]]:
    if len(modules) == 1:
        return [(modules[0], weight)]
    sizes = [int(model.get_submodule(module).out_features) for module in modules]  # type: ignore[arg-type]
    if isinstance(weight, DenseWeight):
        biases: Sequence[Tensor | None] = (
            [None] * len(sizes) if weight.bias is None else torch.split(weight.bias, sizes)
        )
        parts = torch.split(weight.weight, sizes)
        return list(zip(modules, map(DenseWeight, parts, biases), strict=True))
    rows, start = weight.to_layout("rows"), 0
    result: list[tuple[str, PackedWeight | DenseWeight]] = []
    for module, size in zip(modules, sizes, strict=True):
        result.append((module, rows.rows(start, start + size)))
        start += size
    return result


def _set_parameter(model: PreTrainedModel, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(module)
        is_buffer = leaf in dict(owner.named_buffers(recurse=False))
        expected = (owner.get_buffer if is_buffer else owner.get_parameter)(leaf).shape
    except AttributeError as error:
        raise CheckpointError(f"{name} is not part of a {model.config.model_type} model") from error
    if value.shape != expected:
        raise CheckpointError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}")
    setattr(owner, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))
