"""How far a merged checkpoint, or an adapter in 8 bits, is from the base with the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from nybble.engine.adapter_ends import kept_change, rounded_embedding, rounded_head
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.lora import in_8_bits
from nybble.kernels.progress import track
from nybble.loaders import LoRAAdapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.loaders.adapter_changes import MatrixChange
from nybble.quantizers.packed_model import OutputLayer, PackedLinear, load_packed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The output layer and the hidden states of windows.
_Read = tuple[OutputLayer, list[Tensor]]


@torch.no_grad()
def merge_divergence(
    source: Path,
    adapter: LoRAAdapter,
    merged: Path,
    token_ids: Tensor,
    *,
    length: int = 512,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> float:
    """Mean over tokens of KL(source with the adapter ‖ merged), in nats.

    token_ids: int64 ``(tokens,)``, read in windows of ``length``. One model is in memory at a time.
    If the models have different vocabularies, of the tokens that both know.
    """
    reader = _Reader(token_ids, length, device or torch.device("cpu"), dtype, progress)
    return _divergence(reader.read(source, adapter), reader.read(merged, None))


@torch.no_grad()
def rounding_divergence(
    source: Path,
    adapter: LoRAAdapter,
    token_ids: Tensor,
    *,
    length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> float:
    """Mean over tokens of KL(source with the adapter ‖ source with it in 8 bits), in nats.

    In 8 bits as an engine holds it whose adapters' dtype is ``int8``. The rest as
    :func:`merge_divergence`.
    """
    reader = _Reader(token_ids, length, torch.device("cpu"), dtype, progress)
    return _divergence(reader.read(source, adapter), reader.read(source, adapter, rounded=True))


class _Reader:
    """Reads a text with a model, window by window."""

    def __init__(
        self,
        token_ids: Tensor,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: bool,
    ) -> None:
        self._windows = list(torch.split(token_ids.to(device), length))
        self._device, self._dtype, self._progress = device, dtype, progress

    def read(self, folder: Path, adapter: LoRAAdapter | None, *, rounded: bool = False) -> _Read:
        """rounded: whether the adapter is in 8 bits."""
        model = load_packed_model(open_checkpoint(folder), device=self._device, dtype=self._dtype)
        if adapter is not None:
            for name, module in adapter.modules.items():
                _add_lora(
                    model.get_submodule(name), module, self._device, self._dtype, rounded=rounded
                )
            _change_ends(model, adapter, self._dtype, rounded=rounded)
        reading = track(self._windows, "Measuring", self._progress, unit="windows")
        states = [model.base_model(ids[None], use_cache=False)[0][0] for ids in reading]
        return OutputLayer.of(model), states


def _divergence(expected: _Read, found: _Read) -> float:
    """Mean over tokens of KL(expected ‖ found)."""
    total, tokens = 0.0, 0
    for before, after in zip(expected[1], found[1], strict=True):
        pair = expected[0](before), found[0](after)
        both = min(logits.shape[-1] for logits in pair)
        wanted, instead = (log_softmax(logits[:, :both], dim=-1) for logits in pair)
        total += float(kl_div(instead, wanted, reduction="sum", log_target=True))
        tokens += len(before)
    return total / tokens


def _change_ends(
    model: PreTrainedModel, adapter: LoRAAdapter, dtype: torch.dtype, *, rounded: bool
) -> None:
    """The embedding, the output layer and norms as the adapter has them."""
    embedding, head = model.get_input_embeddings(), model.get_submodule("lm_head")
    assert isinstance(embedding, nn.Embedding)
    before = embedding.weight
    if (change := adapter.head) is not None:
        kept: PackedWeight | DenseWeight
        if isinstance(head, PackedLinear):
            weight, bias, kept = head.packed.dequantize(), head.packed.bias, head.packed
        else:
            assert isinstance(head, nn.Linear)
            weight, bias, kept = head.weight, head.bias, DenseWeight(head.weight)
        if rounded:
            change = _rounded_change(change, kept, dtype, embedding=False)
        outputs, inputs = weight.shape
        dense = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        dense.weight = _frozen(change.merged(weight, adapter.vocab).to(before))
        if bias is not None:
            dense.bias = _frozen(bias)
        model.set_submodule("lm_head", dense)
    if (change := adapter.embedding) is not None:
        if rounded:
            change = _rounded_change(change, before.data, dtype, embedding=True)
        embedding.weight = _frozen(change.merged(before, adapter.vocab).to(before))
    for name, tensor in adapter.norms.items():
        model.get_parameter(name).copy_(tensor)


def _rounded_change(
    change: MatrixChange,
    base: Tensor | DenseWeight | PackedWeight,
    dtype: torch.dtype,
    *,
    embedding: bool,
) -> MatrixChange:
    """The change with its whole matrix in 8 bits, if it keeps one."""
    kept = kept_change(change, base)
    if kept.matrix is None:
        return kept
    matrix = kept.matrix.to(dtype)
    if embedding:
        return replace(kept, whole=rounded_embedding(matrix, dtype)[torch.arange(len(matrix))])
    return replace(kept, whole=rounded_head(matrix).dequantize())


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _add_lora(
    layer: nn.Module,
    lora: LoRAModule,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounded: bool,
) -> None:
    if isinstance(layer, PackedLinear):
        weight, old = layer.packed.dequantize(), layer.packed.bias
    else:
        assert isinstance(layer, nn.Linear)
        weight, old = layer.weight, layer.bias
    stretch, bias = lora.stretch(weight), lora.bias(old)
    a, b = lora.a.float(), lora.b.float() * lora.scale
    if stretch is not None:
        b *= stretch[:, None].to(b.device)
    if rounded:  # as slots hold them: with a scale for each column of B
        a, b = _in_8_bits(a), _in_8_bits(b.T).T
    a, b = a.to(device, dtype), b.to(device, dtype)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        product = output if old is None else output - old
        if stretch is not None:
            product = product * stretch.to(product)
        whole = product + (inputs[0] @ a.T) @ b.T
        return whole if bias is None else whole + bias.to(whole)

    layer.register_forward_hook(add)


def _in_8_bits(matrix: Tensor) -> Tensor:
    codes, scales = in_8_bits(matrix)
    return codes.float() * scales[:, None]
