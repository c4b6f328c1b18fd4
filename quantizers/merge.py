"""A base model and an adapter as one checkpoint: W + (α/r)·B·A, exact in float32, then rounded.

On a 4-bit base the sum lies on no 4-bit grid: rounding it adds an error, which is reported for each
layer and can be measured on text. Layers the adapter leaves alone keep their codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS
from nybble.kernels.progress import Progress, track
from nybble.loaders import Checkpoint, CheckpointError, LoRAAdapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule, projection_shapes
from nybble.loaders.shards import Shards
from nybble.quantizers.affine import AffineWeight
from nybble.quantizers.codebook import quantize_codebook
from nybble.quantizers.formats import (
    Format,
    awq_tensors,
    bnb_tensors,
    gptq_tensors,
    quantization_config,
)
from nybble.quantizers.packed_model import load_packed_model
from nybble.quantizers.rtn import quantize_affine
from nybble.quantizers.writer import FolderWriter
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

_CODEBOOKS = ("nf4", "fp4")
_DEFAULT_GROUP = 128
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class MergedLayer:
    """What rounding the merged weight W of one layer cost, in Frobenius norms.

    error: ‖Ŵ − W‖ / ‖W‖. relative_to_change: ‖Ŵ − W‖ / ‖(α/r)·B·A‖; above 1, rounding moved the
    layer further than the adapter did. It is infinite for an adapter that changes nothing.
    """

    name: str
    error: float
    relative_to_change: float


@dataclass(frozen=True)
class _Target:
    """How layers are written. format None is 16 bits."""

    format: Format | None
    group_size: int
    sym: bool
    double_quant: bool
    dtype: torch.dtype


def merge_adapter(
    source: Path,
    adapter: LoRAAdapter,
    target: Path,
    *,
    format: Format | Literal["bf16"] | None = None,
    keep_16_bits: bool = False,
    progress: Progress = True,
) -> list[MergedLayer]:
    """Write ``source`` with ``adapter`` merged into it to ``target``, in a public layout.

    format: ``bf16``, or a 4-bit format; None for the source's own. In the source's own format,
        layers without an adapter are kept exactly; in another, every layer is rounded.
    keep_16_bits: leave the layers that have an adapter in 16 bits, where the others stay 4-bit.

    Returns the cost of each layer the adapter changes. Raises CheckpointError where the source is
    in the packed form or a layer does not fit the format, FileExistsError where the target has
    content, ValueError where keep_16_bits has nothing to keep 4-bit.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.format == "packed":
        raise CheckpointError(
            f"{source} is the packed form: give the checkpoint it was packed from"
        )
    config = json.loads((source / "config.json").read_text())
    same = format is None or format == checkpoint.format
    plan = _plan(source, config, checkpoint.format if format is None else format)
    if keep_16_bits and (not same or plan.format is None):
        raise ValueError("layers can be kept in 16 bits only in the source's own 4-bit format")
    _configure(config, plan, sorted(adapter.modules) if keep_16_bits else [], same)
    shards = Shards(source)
    shapes = projection_shapes(checkpoint.config)
    report: list[MergedLayer] = []
    with FolderWriter(target, source, config) as writer:
        for name in shards.names():
            if _owner(name, shapes) is None:
                writer.add({name: shards.read(name)})
        projections = _projections(checkpoint, shapes)
        total = len(shapes)
        for name, weight in track(projections, "Merging", progress, unit="layers", total=total):
            module = adapter.modules.get(name)
            if name + ".bias" in shards:
                writer.add({name + ".bias": shards.read(name + ".bias")})
            if module is None and same:
                writer.add(_unchanged(shards, name, weight, plan))
            else:
                keep = keep_16_bits and module is not None
                tensors, layer = _merged(name, weight, module, plan, keep)
                writer.add(tensors)
                report += [layer] if layer is not None else []
    return report


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
) -> float:
    """Mean over tokens of KL(source with the adapter ‖ merged), in nats.

    token_ids: int64 ``(tokens,)``, read in windows of ``length``. One model is in memory at a time.
    """
    device = device or torch.device("cpu")
    windows = list(torch.split(token_ids.to(device), length))

    def hidden_states(folder: Path, lora: LoRAAdapter | None) -> tuple[nn.Module, list[Tensor]]:
        model = load_packed_model(open_checkpoint(folder), device=device, dtype=dtype)
        for name, module in lora.modules.items() if lora is not None else ():
            _add_lora(model.get_submodule(name), module, device, dtype)
        states = [model.base_model(ids[None], use_cache=False)[0][0] for ids in windows]
        return model.get_submodule("lm_head"), states

    expected_head, expected = hidden_states(source, adapter)
    head, found = hidden_states(merged, None)
    total = 0.0
    for before, after in zip(expected, found, strict=True):
        wanted = log_softmax(expected_head(before).float(), dim=-1)
        total += float(
            kl_div(log_softmax(head(after).float(), -1), wanted, reduction="sum", log_target=True)
        )
    return total / len(token_ids)


def _add_lora(layer: nn.Module, lora: LoRAModule, device: torch.device, dtype: torch.dtype) -> None:
    a = lora.a.to(device, dtype)
    b = (lora.b.float() * lora.scale).to(device, dtype)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ a.T) @ b.T

    layer.register_forward_hook(add)


def _plan(source: Path, config: Mapping[str, Any], format: str) -> _Target:
    quantization = config.get("quantization_config")
    if quantization is None and (source / "quantize_config.json").is_file():
        quantization = json.loads((source / "quantize_config.json").read_text())
    settings: Mapping[str, Any] = quantization or {}
    if format == "bf16":
        dtype = torch.bfloat16
    else:
        stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        dtype = getattr(torch, stored)
    known: dict[str, Format] = {"gptq": "gptq", "awq": "awq", "nf4": "nf4", "fp4": "fp4"}
    return _Target(
        format=known.get(format),
        group_size=int(
            settings.get("group_size") or settings.get("q_group_size") or _DEFAULT_GROUP
        ),
        sym=format == "gptq" and bool(settings.get("sym", False)),
        double_quant=bool(settings.get("bnb_4bit_use_double_quant", False)),
        dtype=dtype,
    )


def _configure(config: dict[str, Any], plan: _Target, in_16_bits: list[str], same: bool) -> None:
    """Say in config.json how the layers are written."""
    if plan.format is None:
        config.pop("quantization_config", None)
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        return
    if not (same and plan.format in _CODEBOOKS):  # bitsandbytes' tensors are copied as they are
        config["quantization_config"] = quantization_config(
            plan.format,
            plan.group_size,
            sym=plan.sym,
            desc_act=same and bool((config.get("quantization_config") or {}).get("desc_act")),
            double_quant=plan.double_quant,
        )
    settings = config["quantization_config"]
    if in_16_bits and plan.format == "gptq":
        settings["dynamic"] = {f"-:{re.escape(name)}": {} for name in in_16_bits}
    elif in_16_bits:
        key = "modules_to_not_convert" if plan.format == "awq" else "llm_int8_skip_modules"
        settings[key] = [*(settings.get(key) or []), *in_16_bits]


def _owner(tensor: str, shapes: Mapping[str, object]) -> str | None:
    """The projection a tensor belongs to."""
    parts = tensor.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in shapes), None)


def _projections(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, PackedWeight | DenseWeight]]:
    """Every projection by itself, without its bias."""
    for name, weight in checkpoint.weights():
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{part}" for part in _FUSED.get(leaf, (leaf,))]
        if isinstance(weight, Tensor) or names[0] not in shapes:
            continue
        start = 0
        for part in names:
            stop = start + shapes[part][0]
            if isinstance(weight, PackedWeight):
                yield part, weight.to_layout("rows").rows(start, stop)
            else:
                yield part, DenseWeight(weight.weight[start:stop])
            start = stop


def _unchanged(
    shards: Shards, name: str, weight: PackedWeight | DenseWeight, plan: _Target
) -> Mapping[str, Tensor]:
    """A layer in its own format: affine codes written anew, everything else copied."""
    if isinstance(weight, DenseWeight) or plan.format in (None, *_CODEBOOKS):
        names = [n for n in shards.names() if n.startswith(name + ".") and n != name + ".bias"]
        return {n: shards.read(n) for n in names}
    write = gptq_tensors if plan.format == "gptq" else awq_tensors
    return write(name, _affine(name, weight))


def _affine(name: str, weight: PackedWeight) -> AffineWeight:
    """The codes of a packed weight in the order of the inputs."""
    codes, groups = weight.codes(), torch.arange(weight.in_features) // weight.group_size
    if weight.zeros is not None:
        zeros = weight.zeros.to(torch.uint8)
    else:
        zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8)
        if not torch.equal(weight.levels, SYMMETRIC_LEVELS):
            raise CheckpointError(f"{name} is not on an affine grid")
    assert weight.zeros is None or torch.equal(weight.levels, INTEGER_LEVELS)
    if weight.perm is not None:
        order = weight.perm.long().argsort()
        codes, groups = codes[:, order], groups[order]
    return AffineWeight(codes, weight.scales, zeros, groups)


def _merged(
    name: str,
    weight: PackedWeight | DenseWeight,
    module: LoRAModule | None,
    plan: _Target,
    keep_16_bits: bool,
) -> tuple[Mapping[str, Tensor], MergedLayer | None]:
    exact = weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight.float()
    change = None
    if module is not None:
        change = module.scale * (module.b.float() @ module.a.float())
        exact = exact + change
    if plan.format is None or keep_16_bits:
        rounded = exact.to(plan.dtype)
        tensors: Mapping[str, Tensor] = {name + ".weight": rounded}
    elif plan.format == "nf4" or plan.format == "fp4":
        try:
            codebook = quantize_codebook(
                exact.to(plan.dtype), plan.format, double_quant=plan.double_quant
            )
        except ValueError as misfit:
            raise CheckpointError(f"{name}: {misfit}") from misfit
        rounded, tensors = codebook.dequantize(), bnb_tensors(name, codebook)
    else:
        affine = _rounded(name, weight, exact, plan)
        rounded = affine.dequantize()
        write = gptq_tensors if plan.format == "gptq" else awq_tensors
        tensors = write(name, affine)
    if change is None:
        return tensors, None
    moved = float((rounded.float() - exact).norm())
    changed = float(change.norm())
    relative = moved / changed if changed else float("inf")
    return tensors, MergedLayer(name, moved / float(exact.norm()), relative)


def _rounded(
    name: str, weight: PackedWeight | DenseWeight, exact: Tensor, plan: _Target
) -> AffineWeight:
    """On scales fitted anew, in the groups the layer had if it had any."""
    out, columns = exact.shape
    perm = weight.perm if isinstance(weight, PackedWeight) and plan.format == "gptq" else None
    size = columns if plan.group_size == -1 else plan.group_size
    if size < 1 or columns % size or columns % 8 or out % 8:
        raise CheckpointError(
            f"{name}: {out} outputs and {columns} inputs do not divide into groups of {size} "
            "inputs and words of 8"
        )
    if perm is None:
        return quantize_affine(exact, size, sym=plan.sym)
    in_order = quantize_affine(exact[:, perm.long()], size, sym=plan.sym)
    back = perm.long().argsort()
    return AffineWeight(
        in_order.codes[:, back], in_order.scales, in_order.zeros, in_order.g_idx[back]
    )
