"""A base model and an adapter as one checkpoint: W + (α/r)·B·A, exact in float32, then rounded.

With DoRA the rows of the sum are given their magnitudes. Biases are the adapter's.

On a 4-bit base the sum does not lie on the 4-bit grid, and an adapter's change can be smaller than
a step of the grid: rounding to the nearest then loses most of it. With calibration, the base's grid
is kept if it has one, and each column's rounding error is compensated by the columns still to come
(:mod:`nybble.quantizers.on_grid`). Layers without an adapter keep their codes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.progress import Progress, track
from nybble.loaders import AdapterError, CheckpointError, LoRAAdapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.loaders.adapter_changes import resized
from nybble.loaders.adapter_settings import read_own_settings
from nybble.loaders.adapter_tokens import OwnTokenReader, add_own_tokens
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.experts import open_shards
from nybble.loaders.formats import (
    AffineFormat,
    AffineWeight,
    CodebookFormat,
    CodebookWeight,
    OptionError,
    QuantizedWeight,
    WritableFormat,
    WriteOptions,
    writing_format,
    written_formats,
)
from nybble.loaders.model_config import config_to_write
from nybble.loaders.mtp import has_mtp, mtp_tensors, open_mtp
from nybble.loaders.shards import Shards
from nybble.loaders.tokenizer import load_tokenizer
from nybble.quantizers.layers import DecoderLayers, linear_layer
from nybble.quantizers.on_grid import Compensation, Grid
from nybble.quantizers.rtn import round_to_nearest
from nybble.quantizers.stacked_experts import parts_to_write
from nybble.quantizers.writer import folder_writer

logger = logging.getLogger(__name__)

_COARSE_BITS = 4

BF16 = "bf16"  # what `nybble merge --out` calls 16 bits


@dataclass(frozen=True)
class MergedLayer:
    """The rounding error of the merged weight W of one layer.

    error: ‖Ŵ − W‖ / ‖W‖.
    relative_to_change: ‖Ŵ − W‖ / ‖W − W₀‖, W₀ being the base's weight. Above 1, rounding
        moved the layer further than the adapter did. It is infinite for an adapter that changes
        nothing.

    With calibration, ‖D‖ is the root mean square of Dx over the calibration inputs x, otherwise
    Frobenius' norm.
    """

    name: str
    error: float
    relative_to_change: float


@dataclass(frozen=True)
class _Target:
    """How layers are written.

    format: None for 16 bits.
    same: whether it is the source's own format.
    dtype: of the weights that are not quantized.
    """

    format: WritableFormat | None
    same: bool
    dtype: torch.dtype


@torch.no_grad()
def merge_adapter(
    source: Path,
    adapter: LoRAAdapter,
    target: Path,
    *,
    format: str | None = None,
    group_size: int | None = None,
    keep_16_bits: bool = False,
    calibration: Tensor | None = None,
    device: torch.device | None = None,
    progress: Progress = True,
    folder: Path | None = None,
) -> list[MergedLayer]:
    """Write ``source`` with ``adapter`` merged into it to ``target``, in a public layout.

    format: ``bf16``, or one of :func:`nybble.loaders.formats.written_formats`; None for the
        source's own, in which layers without an adapter stay as they are and layers in 16 bits
        stay in 16 bits. In another format every layer is rounded.
    group_size: of another format than the source's; None for the source's, or the format's default.
    keep_16_bits: leave the layers that have an adapter in 16 bits, if the others stay 4-bit.
    calibration: token ids int64 ``(samples, length)`` on which the rounding error is minimized. If
        None, layers are rounded to the nearest with newly fitted scales.
    device: where calibration computes; the CPU if None.
    folder: the adapter's. If its tokenizer has tokens that the source's does not have, and they
        have rows, the source's is written with these and with the adapter's chat template. None to
        leave the tokenizer as it is.

    An MTP head stays as it is. It is left out, with a warning, if it is quantized and the target
    gets another format.

    Returns the cost of each layer the adapter changes. Raises CheckpointError if the source is
    in the packed form, its format can only be read, or a layer does not fit the format,
    FileExistsError if the target has content, ValueError if keep_16_bits has nothing to keep
    4-bit, AdapterError if the adapter has a bias for a layer that has none, or tokens that the
    source's tokenizer cannot have.
    """
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, FolderCheckpoint):
        raise CheckpointError(
            f"{source} is the packed form: give the checkpoint it was packed from"
        )
    config = config_to_write(source)
    plan = _plan(checkpoint, config, format, group_size)
    if keep_16_bits and (not plan.same or plan.format is None):
        raise ValueError("layers can be kept in 16 bits only in the source's own 4-bit format")
    architecture = checkpoint.architecture
    linears = architecture.linears
    if plan.format is not None and not plan.same:
        for name, linear in linears.items():
            try:
                plan.format.check_sizes(linear.out, linear.inputs)
            except ValueError as misfit:
                raise CheckpointError(f"{source}: {name}: {misfit}") from misfit
    shards = open_shards(source, architecture)
    checkpoint.check(shards)
    _refuse_new_biases(adapter, shards)
    in_16_bits = [name for name, module in adapter.modules.items() if module.changes_weight]
    _configure(config, plan, shards, sorted(in_16_bits) if keep_16_bits else [])
    merge = _Merge(checkpoint, shards, adapter, plan, keep_16_bits)
    merge.check()
    if merge.unties:
        _set_in_config(config, "tie_word_embeddings", False)
    if adapter.vocab is not None:
        _set_in_config(config, "vocab_size", adapter.vocab)
    rows = adapter.vocab or architecture.vocab
    tokenizer = None if folder is None else _own_tokenizer(source, folder, rows)
    calibrator = None
    if calibration is not None and plan.format is not None and not keep_16_bits:
        calibrator = _Calibrator(merge, calibration, device or torch.device("cpu"))
    report: list[MergedLayer] = []
    names = track(linears, "Merging", progress, unit="layers")
    parts = parts_to_write(shards, architecture, merge.in_16_bits, dense=plan.format is None)
    with folder_writer(target, source, config, tokenizer, parts) as writer:
        for module in shards.modules:
            if module not in linears:
                writer.add(merge.other(module))
        if plan.same or not _has_packed_mtp(checkpoint):
            for name, tensor in mtp_tensors(checkpoint):
                writer.add({name: tensor})
        else:
            logger.warning("the MTP head is left out: it is in %s itself", checkpoint.format)
        if merge.unties and architecture.head not in shards.modules:
            writer.add({architecture.head + ".weight": merge.end(architecture.head)})
        for _, block in groupby(names, lambda name: name.split(".")[2]):
            moments = calibrator.moments() if calibrator else {}
            values: dict[str, Tensor] = {}
            for name in block:
                if name + ".bias" in merge.shards:
                    writer.add({name + ".bias": merge.bias(name)})
                tensors, values[name], layer = merge.layer(name, moments.get(name))
                writer.add(tensors)
                report += [layer] if layer is not None else []
            if calibrator:
                calibrator.advance(values)
    return report


def _has_packed_mtp(checkpoint: FolderCheckpoint) -> bool:
    return has_mtp(checkpoint) and open_mtp(checkpoint).format != "none"


@dataclass(frozen=True)
class _Merge:
    checkpoint: FolderCheckpoint
    shards: Shards
    adapter: LoRAAdapter
    plan: _Target
    keep_16_bits: bool

    def exact(self, name: str) -> Tensor:
        """The merged weight, float32 ``(out, in)``."""
        weight = self._base(name)
        module = self._module(name)
        return weight if module is None else module.merged(weight)

    def bias(self, name: str) -> Tensor:
        """The merged bias of a layer that has one, in its own dtype."""
        base = self.shards.read(name + ".bias")
        module = self.adapter.modules.get(name)
        bias = base if module is None else module.bias(base)
        assert bias is not None, name
        return bias.to(base.dtype)

    def check(self) -> None:
        """Raises AdapterError for an aLoRA, and CheckpointError if the adapter changes an output
        layer that stays quantized."""
        if self.adapter.invocation:
            raise AdapterError(
                "the adapter is an aLoRA, which is active in a part of the text: it cannot be "
                "merged; serve it beside its base"
            )
        head = self.checkpoint.architecture.head
        stays = self.plan.format is not None and self.plan.same
        changed = self._changes_end(head) and head in self.shards.modules
        if changed and stays and self._quantized(head):
            raise CheckpointError(
                f"the adapter changes {head}, which {self.checkpoint.folder} has quantized: "
                f"merge into 16 bits (--out {BF16}), or serve the adapter beside its base"
            )

    @cached_property
    def unties(self) -> bool:
        """Whether embedding and output layer are one in the base, and no longer afterwards."""
        about, adapter = self.checkpoint.architecture, self.adapter
        if not about.tied or (adapter.embedding is None and adapter.head is None):
            return False
        return not torch.equal(self.end(about.embedding), self.end(about.head))

    def end(self, module: str) -> Tensor:
        """The merged weight of the embedding or the output layer, in its own dtype."""
        about = self.checkpoint.architecture
        change = self.adapter.embedding if module == about.embedding else self.adapter.head
        stored = about.embedding if about.tied and module not in self.shards.modules else module
        if self._quantized(stored):
            base = _dense(self.checkpoint.projection(self.shards, stored)).to(self.plan.dtype)
        else:
            base = self.shards.read(stored + ".weight")
        if change is None:
            return resized(base, self.adapter.vocab)
        return change.merged(base, self.adapter.vocab).to(base.dtype)

    def _changes_end(self, module: str) -> bool:
        """Whether the embedding or the output layer changes, be it in its number of rows."""
        about, adapter = self.checkpoint.architecture, self.adapter
        change = adapter.embedding if module == about.embedding else adapter.head
        return change is not None or adapter.vocab is not None

    def in_16_bits(self, name: str) -> bool:
        """Whether a layer is written in 16 bits because all are, or because the base has it so."""
        return self.plan.format is None or (self.plan.same and not self._quantized(name))

    def changes(self, name: str) -> bool:
        return not self.plan.same or self._module(name) is not None

    def _module(self, name: str) -> LoRAModule | None:
        """The layer's change, if it changes the weight."""
        module = self.adapter.modules.get(name)
        return module if module is not None and module.changes_weight else None

    def _base(self, name: str) -> Tensor:
        return _dense(self.checkpoint.projection(self.shards, name))

    def layer(
        self, name: str, compensation: Compensation | None
    ) -> tuple[Mapping[str, Tensor], Tensor, MergedLayer | None]:
        """The layer's tensors, the weight they stand for, and its cost if an adapter is in it."""
        if not self.changes(name):
            return self._stored(name), self._base(name), None
        exact, plan = self.exact(name), self.plan
        if plan.format is None or self.keep_16_bits or self.in_16_bits(name):
            rounded = exact.to(plan.dtype)
            tensors: Mapping[str, Tensor] = {name + ".weight": rounded}
        else:
            quantized = self._round(name, exact, plan.format, compensation)
            tensors, rounded = plan.format.tensors(name, quantized), quantized.dequantize()
        module = self._module(name)
        if module is None:
            return tensors, rounded, None
        difference = rounded.float() - exact
        if compensation is None:
            moved, whole = float(difference.norm()), float(exact.norm())
            change = float((exact - self._base(name)).norm())
        else:
            moved, whole = (compensation.output_norm(d) for d in (difference, exact))
            if not module.stretches:
                change = module.scale * compensation.output_norm(module.a, module.b)
            else:
                change = compensation.output_norm(exact - self._base(name))
        relative = moved / change if change else float("inf")
        return tensors, rounded, MergedLayer(name, moved / whole if moved else 0.0, relative)

    def other(self, module: str) -> Mapping[str, Tensor]:
        """The tensors of what is no projection: norms, embeddings, the output layer."""
        about = self.checkpoint.architecture
        if module in (about.embedding, about.head) and self._changes_end(module):
            bias = module + ".bias"
            stored = {}
            if bias in self.shards:
                stored[bias] = resized(self.shards.read(bias)[:, None], self.adapter.vocab)[:, 0]
            return {module + ".weight": self.end(module)} | stored
        if self.plan.same or not self._quantized(module):
            return {n: self.tensor(n) for n in self._names(module)}
        weight = _dense(self.checkpoint.projection(self.shards, module))
        bias = module + ".bias"
        stored = {bias: self.shards.read(bias)} if bias in self.shards else {}
        return {module + ".weight": weight.to(self.plan.dtype)} | stored

    def tensor(self, name: str) -> Tensor:
        """A tensor of a norm or another module, as the adapter has it or else the base."""
        base = self.shards.read(name)
        own = self.adapter.norms.get(name)
        return base if own is None else own.to(base.dtype).view(base.shape)

    def _names(self, module: str) -> list[str]:
        return list(self.shards.modules[module].values())

    def _stored(self, name: str) -> dict[str, Tensor]:
        return {n: self.shards.read(n) for n in self._names(name) if n != name + ".bias"}

    def _quantized(self, module: str) -> bool:
        own = self.checkpoint.quantization
        return own is not None and own.owns(self.shards.modules[module])

    def _round(
        self, name: str, exact: Tensor, format: WritableFormat, compensation: Compensation | None
    ) -> QuantizedWeight:
        """With calibration: on the base's own grid if it is coarse, else on newly fitted scales.

        An 8-bit grid is not kept: a change is larger than its steps and would be cut off at its
        ends. So would rows that (IA)³ multiplies.
        """
        base = format.quantized(self.shards, name) if self.plan.same else None
        try:
            fine = isinstance(base, AffineWeight) and base.bits > _COARSE_BITS
            module = self._module(name)
            multiplied = module is not None and module.factors is not None
            if base is None or compensation is None or fine or multiplied:
                base = _fitted(exact, self.plan.dtype, format, name, base)
        except ValueError as misfit:
            raise CheckpointError(f"{name}: {misfit}") from misfit
        if compensation is None:
            return base
        return replace(base, codes=compensation.codes(exact, Grid.of(base)))


def _fitted(
    exact: Tensor,
    dtype: torch.dtype,
    format: WritableFormat,
    name: str,
    base: QuantizedWeight | None,
) -> QuantizedWeight:
    """Round to the nearest with newly fitted scales, in the base's groups if it has any."""
    if isinstance(base, CodebookWeight) and isinstance(format, CodebookFormat):
        format = replace(format, blocksize=base.blocksize)
    if not isinstance(format, AffineFormat):
        return round_to_nearest(exact.to(dtype), format)  # the codebook weight stores this dtype
    own = format.for_module(name)
    if not isinstance(base, AffineWeight):
        return round_to_nearest(exact, own)
    order = base.g_idx.argsort(stable=True)
    fitted = round_to_nearest(exact[:, order], own)
    assert isinstance(fitted, AffineWeight)
    return replace(fitted, codes=fitted.codes[:, order.argsort()], g_idx=base.g_idx)


class _Calibrator:
    """Statistics of the merged model's layer inputs, block by block, after rounded blocks."""

    def __init__(self, merge: _Merge, token_ids: Tensor, device: torch.device) -> None:
        self._merge = merge
        source = merge.checkpoint.folder
        self._blocks = DecoderLayers(source, device, token_ids.shape[1], self._parameter)
        self._hidden = self._blocks.embed(token_ids)
        self._index = 0

    def moments(self) -> dict[str, Compensation]:
        """By layer, for those of the next block to be rounded; one object for each shared input."""
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
        """Run the block with its rounded weights and go on to the next."""
        for name, value in values.items():
            layer = linear_layer(self._block, name.split(".", 3)[3])
            layer.weight.data = value.to(layer.weight)
        self._hidden = self._blocks.outputs(self._block, self._hidden)
        self._blocks.unload(self._index)
        self._index += 1

    def _parameter(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module == self._merge.checkpoint.architecture.embedding:
            return self._merge.end(module)
        stored = self._hidden.dtype
        if module in self._merge.checkpoint.architecture.linears:
            return self._merge.exact(module).to(stored)
        if name.removesuffix(".bias") in self._merge.checkpoint.architecture.linears:
            return self._merge.bias(name.removesuffix(".bias")).to(stored)
        return self._merge.tensor(name).to(stored)


def _set_in_config(config: dict[str, Any], name: str, value: object) -> None:
    config[name] = value
    if isinstance(text := config.get("text_config"), dict):
        text[name] = value


def _own_tokenizer(source: Path, folder: Path, rows: int) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer with those of an adapter's tokens that have rows; None without any."""
    tokenizer = load_tokenizer(source)
    own = OwnTokenReader(tokenizer).read(folder)
    if own is None or not (own := own.below(rows)).added:
        return None
    add_own_tokens(tokenizer, own)
    if (template := read_own_settings(folder).template) is not None:
        tokenizer.chat_template = template
    return tokenizer


def _dense(weight: PackedWeight | DenseWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight.float()


def _refuse_new_biases(adapter: LoRAAdapter, shards: Shards) -> None:
    for name, module in adapter.modules.items():
        if module.changes_bias and name + ".bias" not in shards:
            raise AdapterError(
                f"the adapter has a bias for {name}, which has none in the base, so the merged "
                "model could not hold it: serve the adapter beside its base instead"
            )


def _plan(
    checkpoint: FolderCheckpoint,
    config: Mapping[str, Any],
    format: str | None,
    group_size: int | None,
) -> _Target:
    own = checkpoint.quantization
    stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, stored)
    if group_size is not None and format in (None, BF16, checkpoint.format):
        raise OptionError("group_size", "goes with a 4-bit format that the base does not have")
    if format == BF16:
        return _Target(None, own is None, torch.bfloat16)
    if format is None or format == checkpoint.format:
        if own is not None and not isinstance(own, WritableFormat):
            raise CheckpointError(
                f"{checkpoint.folder}: {own.name} can be read and not written: choose another "
                f"format (--out {', '.join((*written_formats(), BF16))})"
            )
        return _Target(own, True, dtype)
    options = WriteOptions(group_size=group_size)
    return _Target(writing_format(format, options, like=own), False, dtype)


def _configure(
    config: dict[str, Any], plan: _Target, shards: Shards, in_16_bits: list[str]
) -> None:
    """Record in config.json how the layers are stored."""
    if plan.format is None:
        config.pop("quantization_config", None)
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        return
    format = plan.format
    if in_16_bits:
        found = (name for name, leaves in shards.modules.items() if format.owns(leaves))
        format = format.with_16_bits(in_16_bits, [name for name in found if name not in in_16_bits])
    config["quantization_config"] = dict(format.settings)
