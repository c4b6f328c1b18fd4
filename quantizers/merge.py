"""A base model and an adapter as one checkpoint: W + (α/r)·B·A, exact in float32, then rounded.

On a 4-bit base the sum lies on no 4-bit grid, and an adapter's change can be smaller than a step of
the grid: rounding to the nearest then loses most of it. Calibrated, the base's grid is kept where
there is one, and each column's rounding error is made up for by those still to come
(:mod:`nybble.quantizers.on_grid`). Layers the adapter leaves alone keep their codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.packed import INTEGER_LEVELS, SYMMETRIC_LEVELS
from nybble.kernels.progress import Progress, track
from nybble.loaders import CheckpointError, LoRAAdapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.shards import Shards
from nybble.quantizers.affine import AffineWeight
from nybble.quantizers.blocks import DecoderBlocks, linear_layer
from nybble.quantizers.codebook import quantize_codebook
from nybble.quantizers.formats import (
    Format,
    awq_tensors,
    bnb_tensors,
    codebook_words,
    gptq_tensors,
    quantization_config,
)
from nybble.quantizers.on_grid import Compensation, Grid
from nybble.quantizers.rtn import quantize_affine
from nybble.quantizers.writer import FolderWriter

_CODEBOOKS = ("nf4", "fp4")
_DEFAULT_GROUP = 128


@dataclass(frozen=True)
class MergedLayer:
    """What rounding the merged weight W of one layer cost.

    error: ‖Ŵ − W‖ / ‖W‖. relative_to_change: ‖Ŵ − W‖ / ‖(α/r)·B·A‖; above 1, rounding moved the
    layer further than the adapter did. It is infinite for an adapter that changes nothing.
    Calibrated, ‖D‖ is the root mean square of Dx over the calibration inputs x, otherwise
    Frobenius' norm.
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


@torch.no_grad()
def merge_adapter(
    source: Path,
    adapter: LoRAAdapter,
    target: Path,
    *,
    format: Format | Literal["bf16"] | None = None,
    keep_16_bits: bool = False,
    calibration: Tensor | None = None,
    device: torch.device | None = None,
    progress: Progress = True,
) -> list[MergedLayer]:
    """Write ``source`` with ``adapter`` merged into it to ``target``, in a public layout.

    format: ``bf16``, or a 4-bit format; None for the source's own. In the source's own format,
        layers without an adapter are kept exactly; in another, every layer is rounded.
    keep_16_bits: leave the layers that have an adapter in 16 bits, where the others stay 4-bit.
    calibration: token ids int64 ``(samples, length)`` the rounding error is made small on. Without,
        layers are rounded to the nearest on scales fitted anew.
    device: where calibration computes; the CPU if None.

    Returns the cost of each layer the adapter changes. Raises CheckpointError where the source is
    in the packed form or a layer does not fit the format, FileExistsError where the target has
    content, ValueError where keep_16_bits has nothing to keep 4-bit.
    """
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, FolderCheckpoint):
        raise CheckpointError(
            f"{source} is the packed form: give the checkpoint it was packed from"
        )
    config = json.loads((source / "config.json").read_text())
    same = format is None or format == checkpoint.format
    plan = _plan(source, config, checkpoint.format if format is None else format)
    if keep_16_bits and (not same or plan.format is None):
        raise ValueError("layers can be kept in 16 bits only in the source's own 4-bit format")
    _configure(config, plan, sorted(adapter.modules) if keep_16_bits else [], same)
    linears = checkpoint.architecture.linears
    merge = _Merge(checkpoint, Shards(source), adapter, plan, same, keep_16_bits)
    calibrator = None
    if calibration is not None and plan.format is not None and not keep_16_bits:
        calibrator = _Calibrator(merge, calibration, device or torch.device("cpu"))
    report: list[MergedLayer] = []
    names = track(linears, "Merging", progress, unit="layers")
    with FolderWriter(target, source, config) as writer:
        for name in merge.shards.names():
            if _owner(name, linears) is None:
                writer.add({name: merge.shards.read(name)})
        for _, block in groupby(names, lambda name: name.split(".")[2]):
            moments = calibrator.moments() if calibrator else {}
            values: dict[str, Tensor] = {}
            for name in block:
                if name + ".bias" in merge.shards:
                    writer.add({name + ".bias": merge.shards.read(name + ".bias")})
                tensors, values[name], layer = merge.layer(name, moments.get(name))
                writer.add(tensors)
                report += [layer] if layer is not None else []
            if calibrator:
                calibrator.advance(values)
    return report


@dataclass(frozen=True)
class _Merge:
    """same: the layers without an adapter stay as they are."""

    checkpoint: FolderCheckpoint
    shards: Shards
    adapter: LoRAAdapter
    plan: _Target
    same: bool
    keep_16_bits: bool

    def exact(self, name: str) -> Tensor:
        """The merged weight, float32 ``(out, in)``."""
        weight = _dense(self.checkpoint.projection(self.shards, name))
        module = self.adapter.modules.get(name)
        return weight if module is None else weight + _change(module)

    def changes(self, name: str) -> bool:
        return not self.same or name in self.adapter.modules

    def layer(
        self, name: str, compensation: Compensation | None
    ) -> tuple[Mapping[str, Tensor], Tensor, MergedLayer | None]:
        """The layer's tensors, the weight they stand for, and its cost if an adapter is in it."""
        weight = self.checkpoint.projection(self.shards, name)
        if not self.changes(name):
            return self._unchanged(name, weight), _dense(weight), None
        exact, plan = self.exact(name), self.plan
        if plan.format is None or self.keep_16_bits:
            rounded = exact.to(plan.dtype)
            tensors: Mapping[str, Tensor] = {name + ".weight": rounded}
        elif plan.format == "nf4" or plan.format == "fp4":
            tensors, rounded = self._on_codebook(name, weight, exact, compensation)
        else:
            affine = self._on_affine(name, weight, exact, compensation)
            tensors, rounded = self._affine_tensors(name, affine), affine.dequantize()
        module = self.adapter.modules.get(name)
        if module is None:
            return tensors, rounded, None
        difference = rounded.float() - exact
        if compensation is None:
            moved, whole, change = (float(d.norm()) for d in (difference, exact, _change(module)))
        else:
            moved, whole = (compensation.output_norm(d) for d in (difference, exact))
            change = module.scale * compensation.output_norm(module.a, module.b)
        relative = moved / change if change else float("inf")
        return tensors, rounded, MergedLayer(name, moved / whole, relative)

    def _unchanged(self, name: str, weight: PackedWeight | DenseWeight) -> Mapping[str, Tensor]:
        """Affine codes written anew, everything else copied."""
        if isinstance(weight, DenseWeight) or self.plan.format in (None, *_CODEBOOKS):
            return self._stored(name)
        return self._affine_tensors(name, _affine(name, weight))

    def _stored(self, name: str) -> dict[str, Tensor]:
        names = [n for n in self.shards.names() if n.startswith(name + ".")]
        return {n: self.shards.read(n) for n in names if n != name + ".bias"}

    def _affine_tensors(self, name: str, weight: AffineWeight) -> Mapping[str, Tensor]:
        return (gptq_tensors if self.plan.format == "gptq" else awq_tensors)(name, weight)

    def _on_affine(
        self,
        name: str,
        weight: PackedWeight | DenseWeight,
        exact: Tensor,
        compensation: Compensation | None,
    ) -> AffineWeight:
        """Calibrated, on the base's own grid if it has one, otherwise on scales fitted anew."""
        if compensation is None:
            return _rounded(name, weight, exact, self.plan)
        if self.same and isinstance(weight, PackedWeight):
            base = _affine(name, weight)
        else:
            base = _rounded(name, weight, exact, self.plan)
        return replace(base, codes=compensation.codes(exact, Grid.of_affine(base)))

    def _on_codebook(
        self,
        name: str,
        weight: PackedWeight | DenseWeight,
        exact: Tensor,
        compensation: Compensation | None,
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """As :meth:`_on_affine`; returns the tensors and the weight they stand for."""
        plan = self.plan
        assert plan.format == "nf4" or plan.format == "fp4"
        if compensation is not None and self.same and isinstance(weight, PackedWeight):
            grid = Grid.of_packed(weight)
            codes = compensation.codes(exact, grid)
            tensors = self._stored(name)
            before = tensors[name + ".weight"]
            words = codebook_words(codes).view(before.dtype).view(before.shape)
            return tensors | {name + ".weight": words}, grid.values(codes)
        try:
            codebook = quantize_codebook(
                exact.to(plan.dtype), plan.format, double_quant=plan.double_quant
            )
        except ValueError as misfit:
            raise CheckpointError(f"{name}: {misfit}") from misfit
        if compensation is not None:
            codes = compensation.codes(exact, Grid.of_blocks(codebook))
            codebook = replace(codebook, codes=codes.view(codebook.codes.shape))
        return bnb_tensors(name, codebook), codebook.dequantize()


class _Calibrator:
    """What the layers of the merged model read, block by block, earlier blocks being rounded."""

    def __init__(self, merge: _Merge, token_ids: Tensor, device: torch.device) -> None:
        self._merge = merge
        source = merge.checkpoint.folder
        self._blocks = DecoderBlocks(source, device, token_ids.shape[1], self._parameter)
        self._hidden = self._blocks.embed(token_ids)
        self._index = 0

    def moments(self) -> dict[str, Compensation]:
        """For the next block's layers that are to be rounded, those with one input sharing one."""
        self._block = self._blocks.load(self._index)
        prefix = self._blocks.architecture.module(self._index, "")
        groups = ([each.name for each in g.linears] for g in self._blocks.groups(self._index))
        stages = [s for s in groups if any(self._merge.changes(prefix + name) for name in s)]
        if not stages:
            return {}
        found = self._blocks.statistics(self._block, self._hidden, [stage[0] for stage in stages])
        result: dict[str, Compensation] = {}
        for stage in stages:
            result |= dict.fromkeys(
                (prefix + name for name in stage), Compensation(found[stage[0]].second_moment)
            )
        return result

    def advance(self, values: Mapping[str, Tensor]) -> None:
        """Go on to the block after, with the block's weights as they were rounded."""
        for name, value in values.items():
            layer = linear_layer(self._block, name.split(".", 3)[3])
            layer.weight.data = value.to(layer.weight)
        self._hidden = self._blocks.outputs(self._block, self._hidden)
        self._blocks.unload(self._index)
        self._index += 1

    def _parameter(self, name: str) -> Tensor:
        stored, shards = self._hidden.dtype, self._merge.shards
        module = name.removesuffix(".weight")
        if module in self._merge.checkpoint.architecture.linears:
            return self._merge.exact(module).to(stored)
        return shards.read(name).to(stored)


def _dense(weight: PackedWeight | DenseWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight.float()


def _change(module: LoRAModule) -> Tensor:
    return module.scale * (module.b.float() @ module.a.float())


def _plan(source: Path, config: Mapping[str, Any], format: str) -> _Target:
    quantization = config.get("quantization_config")
    if quantization is None and (source / "quantize_config.json").is_file():
        quantization = json.loads((source / "quantize_config.json").read_text())
    settings: Mapping[str, Any] = quantization or {}
    if format == "gptq" and settings.get("bits", 4) != 4:
        raise CheckpointError(
            f"{source} has weights of {settings['bits']} bits: an adapter can be merged into them "
            "in 16 bits (--keep-16-bits), and rounded to no other width than 4"
        )
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
        # Where the list is empty, transformers leaves out the head by itself.
        settings[key] = [*(settings.get(key) or ["lm_head"]), *in_16_bits]


def _owner(tensor: str, shapes: Mapping[str, object]) -> str | None:
    """The projection a tensor belongs to."""
    parts = tensor.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in shapes), None)


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
