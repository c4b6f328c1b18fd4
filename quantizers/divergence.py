"""How far a merged checkpoint is from its base with the adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from nybble.kernels.progress import track
from nybble.loaders import LoRAAdapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.quantizers.packed_model import PackedLinear, load_packed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    device = device or torch.device("cpu")
    windows = list(torch.split(token_ids.to(device), length))

    def hidden_states(folder: Path, lora: LoRAAdapter | None) -> tuple[nn.Module, list[Tensor]]:
        model = load_packed_model(open_checkpoint(folder), device=device, dtype=dtype)
        for name, module in lora.modules.items() if lora is not None else ():
            _add_lora(model.get_submodule(name), module, device, dtype)
        if lora is not None:
            _change_ends(model, lora)
        reading = track(windows, "Measuring", progress, unit="windows")
        states = [model.base_model(ids[None], use_cache=False)[0][0] for ids in reading]
        return model.get_submodule("lm_head"), states

    expected_head, expected = hidden_states(source, adapter)
    head, found = hidden_states(merged, None)
    total = 0.0
    for before, after in zip(expected, found, strict=True):
        pair = expected_head(before).float(), head(after).float()
        both = min(logits.shape[-1] for logits in pair)
        wanted, merged_to = (log_softmax(logits[:, :both], dim=-1) for logits in pair)
        total += float(kl_div(merged_to, wanted, reduction="sum", log_target=True))
    return total / len(token_ids)


def _change_ends(model: PreTrainedModel, adapter: LoRAAdapter) -> None:
    """The embedding, the output layer and norms as the adapter has them."""
    embedding, head = model.get_input_embeddings(), model.get_submodule("lm_head")
    assert isinstance(embedding, nn.Embedding)
    before = embedding.weight
    if adapter.head is not None:
        if isinstance(head, PackedLinear):
            weight, bias = head.packed.dequantize(), head.packed.bias
        else:
            assert isinstance(head, nn.Linear)
            weight, bias = head.weight, head.bias
        outputs, inputs = weight.shape
        dense = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        dense.weight = _frozen(adapter.head.merged(weight, adapter.vocab).to(before))
        if bias is not None:
            dense.bias = _frozen(bias)
        model.set_submodule("lm_head", dense)
    if adapter.embedding is not None:
        embedding.weight = _frozen(adapter.embedding.merged(before, adapter.vocab).to(before))
    for name, tensor in adapter.norms.items():
        model.get_parameter(name).copy_(tensor)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _add_lora(layer: nn.Module, lora: LoRAModule, device: torch.device, dtype: torch.dtype) -> None:
    if isinstance(layer, PackedLinear):
        weight, old = layer.packed.dequantize(), layer.packed.bias
    else:
        assert isinstance(layer, nn.Linear)
        weight, old = layer.weight, layer.bias
    stretch, bias = lora.stretch(weight), lora.bias(old)
    a = lora.a.to(device, dtype)
    b = (lora.b.float() * lora.scale).to(device, dtype)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        product = output if old is None else output - old
        whole = product + (inputs[0] @ a.T) @ b.T
        if stretch is not None:
            whole = whole * stretch.to(whole)
        return whole if bias is None else whole + bias.to(whole)

    layer.register_forward_hook(add)
