"""Quantizes a 16-bit checkpoint folder into one of the public 4-bit layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig

from nybble.kernels.progress import Progress, track
from nybble.loaders import CheckpointError
from nybble.loaders.shards import Shards
from nybble.models import LinearGroup, architecture_of
from nybble.quantizers.affine import WIDTHS, AffineWeight
from nybble.quantizers.awq import awq_block
from nybble.quantizers.blocks import (
    DecoderBlocks,
    InputStatistics,
    linear_layer,
    output_error,
)
from nybble.quantizers.codebook import quantize_codebook
from nybble.quantizers.formats import (
    Format,
    awq_tensors,
    bnb_tensors,
    gptq_tensors,
    quantization_config,
    whole_words,
)
from nybble.quantizers.gptq import GptqSettings, gptq
from nybble.quantizers.rtn import quantize_affine
from nybble.quantizers.writer import FolderWriter

_SEARCHED_TOKENS = 2048  # on which AWQ tries scales; statistics are of all calibration tokens


@dataclass(frozen=True)
class LayerError:
    """‖(Ŵ − W)x‖² over ‖Wx‖², means over the calibration tokens, for linear layer ``name``."""

    name: str
    relative: float


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    format: Format,
    group_size: int = 128,
    sym: bool = False,
    bits: int = 4,
    double_quant: bool = False,
    calibration: Tensor | None = None,
    settings: GptqSettings | None = None,
    clip: bool = False,
    device: torch.device | None = None,
    progress: Progress = True,
) -> list[LayerError]:
    """Quantize every linear layer of the decoder; embeddings and head stay as they are.

    group_size: inputs that share a scale, −1 for all of them; NF4 and FP4 have blocks of 64.
    sym: for GPTQ, a fixed zero in the middle of the codes.
    bits: of a code: 4, and for GPTQ also 2, 3 and 8.
    double_quant: for NF4 and FP4, their absmax in 8 bits.
    calibration: token ids int64 ``(samples, length)``, for GPTQ and AWQ. Without, both layouts
        are filled by rounding to the nearest.
    settings: for GPTQ with calibration.
    clip: for AWQ with calibration, search how far to clip each group's weights, as the paper does.
    device: where the calibrated methods compute; the CPU if None.

    One decoder block at a time is in memory. Returns the error of every layer that calibration
    measured. Raises CheckpointError where the source is quantized already or a layer's sizes do
    not fit, FileExistsError where the target has content, ValueError for an option that the
    format does not take.
    """
    _check_options(format, sym, bits, double_quant, calibration, settings, clip)
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        raise CheckpointError(f"{source} is quantized already; give the 16-bit checkpoint")
    settings = settings or GptqSettings()
    config["quantization_config"] = quantization_config(
        format,
        group_size,
        sym=sym,
        desc_act=calibration is not None and settings.desc_act,
        double_quant=double_quant,
        bits=bits,
    )
    shards = Shards(source)
    architecture = architecture_of(AutoConfig.from_pretrained(source, local_files_only=True))
    linears = {name + ".weight" for name in architecture.linears}
    for name in filter(linears.__contains__, shards.names()):
        try:
            _check_sizes(format, shards.read(name), group_size, bits)
        except ValueError as misfit:
            module = name.removesuffix(".weight")
            raise CheckpointError(f"{source}: {module}: {misfit}") from misfit
    with FolderWriter(target, source, config) as writer:
        if calibration is None:
            for name in track(shards.names(), "Quantizing", progress, unit="tensors"):
                tensor = shards.read(name)
                if name in linears:
                    module = name.removesuffix(".weight")
                    writer.add(
                        _rounded(format, module, tensor, group_size, sym, bits, double_quant)
                    )
                else:
                    writer.add({name: tensor})
            return []
        writer.add({name: shards.read(name) for name in shards.names() if ".layers." not in name})
        errors: list[LayerError] = []
        blocks = DecoderBlocks(source, device or torch.device("cpu"), calibration.shape[1])
        hidden = blocks.embed(calibration)
        for index in track(range(len(blocks)), "Quantizing", progress, unit="blocks"):
            block = blocks.load(index)
            if format == "gptq":
                quantized = _gptq_block(
                    blocks, block, blocks.groups(index), hidden, group_size, sym, bits, settings
                )
                hidden = blocks.outputs(block, hidden)
            else:
                # The sink's few channels would decide the scales of all.
                layer = blocks.architecture.layers[index]
                names = [group.linears[0].name for group in layer.groups]
                statistics = blocks.statistics(block, hidden, names, first=1)
                searched = hidden[: max(1, _SEARCHED_TOKENS // hidden.shape[1])]
                modules = dict.fromkeys(group.module for group in layer.groups)
                outputs = blocks.module_outputs(block, searched, tuple(modules))
                # The next block reads what the full-precision model gives it, as in the paper.
                hidden = blocks.outputs(block, hidden)
                quantized = awq_block(
                    block,
                    layer,
                    statistics,
                    outputs,
                    group_size,
                    norm_offset=blocks.architecture.norm.offset,
                    clip=clip,
                )
            prefix = blocks.architecture.module(index, "")
            for name, (weight, error) in quantized.items():
                to_tensors = gptq_tensors if format == "gptq" else awq_tensors
                writer.add(to_tensors(prefix + name, weight))
                errors.append(LayerError(prefix + name, error))
                if progress is True:
                    tqdm.write(f"{prefix}{name}: relative output error {error:.2e}")
            others = block.state_dict()
            for name in quantized:
                del others[name + ".weight"]
            writer.add({prefix + name: tensor for name, tensor in others.items()})
            blocks.unload(index)
        return errors


def _gptq_block(
    blocks: DecoderBlocks,
    block: nn.Module,
    groups: Sequence[LinearGroup],
    hidden: Tensor,
    group_size: int,
    sym: bool,
    bits: int,
    settings: GptqSettings,
) -> dict[str, tuple[AffineWeight, float]]:
    """Quantize the layers of ``block`` in place, those that share an input as one matrix.

    Returns the quantized weights and their relative errors by name.
    """
    result: dict[str, tuple[AffineWeight, float]] = {}
    statistics: dict[str, InputStatistics] = {}
    stages = [[linear.name for linear in group.linears] for group in groups]
    if not settings.true_sequential:
        statistics = blocks.statistics(block, hidden, [stage[0] for stage in stages])
    for stage in stages:
        if settings.true_sequential:
            statistics = blocks.statistics(block, hidden, stage[:1])
        moment = statistics[stage[0]].second_moment
        layers = [linear_layer(block, name) for name in stage]
        weights = [layer.weight.detach().float() for layer in layers]
        whole = gptq(
            torch.cat(weights),
            moment,
            _size(weights[0], group_size),
            sym=sym,
            bits=bits,
            settings=settings,
        )
        start = 0
        for name, layer, weight in zip(stage, layers, weights, strict=True):
            part = whole.rows(start, start + len(weight))
            start += len(weight)
            rounded = part.dequantize()
            error = output_error(rounded - weight, moment) / output_error(weight, moment)
            layer.weight.data = rounded.to(layer.weight.dtype)
            result[name] = (part, error)
    return result


def _rounded(
    format: Format,
    module: str,
    weight: Tensor,
    group_size: int,
    sym: bool,
    bits: int,
    nested: bool,
) -> Mapping[str, Tensor]:
    if format == "nf4" or format == "fp4":
        return bnb_tensors(module, quantize_codebook(weight, format, double_quant=nested))
    rounded = quantize_affine(weight, _size(weight, group_size), sym=sym, bits=bits)
    return gptq_tensors(module, rounded) if format == "gptq" else awq_tensors(module, rounded)


def _size(weight: Tensor, group_size: int) -> int:
    return weight.shape[1] if group_size == -1 else group_size


def _check_sizes(format: Format, weight: Tensor, group_size: int, bits: int) -> None:
    out, columns = weight.shape
    if format in ("nf4", "fp4"):
        if weight.numel() % 64:
            raise ValueError(f"{out}×{columns} is not a multiple of 64")
        return
    size, word = _size(weight, group_size), whole_words(bits)
    if size < 1 or columns % size or columns % word or out % word:
        raise ValueError(
            f"{out} outputs and {columns} inputs do not divide into groups of {size} "
            f"inputs and words of {word}"
        )


def _check_options(
    format: Format,
    sym: bool,
    bits: int,
    double_quant: bool,
    calibration: Tensor | None,
    settings: GptqSettings | None,
    clip: bool,
) -> None:
    codebook = format in ("nf4", "fp4")
    if double_quant and not codebook:
        raise ValueError(f"double_quant is for nf4 and fp4, not {format}")
    if calibration is not None and codebook:
        raise ValueError(f"{format} takes no calibration text: its levels are fixed")
    if settings is not None and (format != "gptq" or calibration is None):
        raise ValueError("GPTQ's settings need the format gptq and calibration text")
    if clip and (format != "awq" or calibration is None):
        raise ValueError("clipping needs the format awq and calibration text")
    if calibration is not None and calibration.shape[1] < 2:
        raise ValueError("calibration texts of one token say nothing")
    if bits not in WIDTHS:
        raise ValueError(f"bits is {bits}, expected one of {', '.join(map(str, WIDTHS))}")
    if bits != 4 and format != "gptq":
        raise ValueError(f"{bits} bits are for gptq: {format} has 4")
    if sym and format == "awq":
        raise ValueError("sym is for gptq: AWQ's layout has zero points")
