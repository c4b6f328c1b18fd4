"""Quantizes a 16-bit checkpoint folder into one of the public 4-bit layouts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nybble.kernels.progress import Bar, Progress, track
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.checkpoint import FolderCheckpoint
from nybble.loaders.experts import open_shards
from nybble.loaders.formats import (
    AffineFormat,
    AffineWeight,
    WritableFormat,
    WriteOptions,
    writing_format,
)
from nybble.loaders.model_config import config_to_write
from nybble.loaders.mtp import mtp_tensors
from nybble.models import Layer, LinearGroup, Mixture
from nybble.quantizers.awq import awq_block
from nybble.quantizers.gptq import GptqSettings, gptq
from nybble.quantizers.layers import (
    DecoderLayers,
    InputStatistics,
    linear_layer,
    relative_error,
)
from nybble.quantizers.rtn import round_to_nearest
from nybble.quantizers.stacked_experts import parts_to_write
from nybble.quantizers.writer import folder_writer

logger = logging.getLogger(__name__)

# Of the input statistics which are gathered in one pass over the calibration tokens.
_STATISTICS_BYTES = 2 << 30
_SEARCHED_TOKENS = 2048  # on which AWQ tries scales; its statistics use all calibration tokens


@dataclass(frozen=True)
class LayerError:
    """‖(Ŵ − W)x‖² over ‖Wx‖², means over the calibration tokens, for linear layer ``name``.

    tokens: how many calibration tokens reached it: all, or those routed to its expert.
    """

    name: str
    relative: float
    tokens: int


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    format: str,
    group_size: int | None = None,
    sym: bool | None = None,
    bits: int | None = None,
    double_quant: bool | None = None,
    calibration: Tensor | None = None,
    settings: GptqSettings | None = None,
    clip: bool = False,
    device: torch.device | None = None,
    progress: Progress = True,
) -> list[LayerError]:
    """Quantize every linear layer of the decoder; embeddings and head stay as they are.

    So does an MTP head that the checkpoint holds.

    format: one of :func:`nybble.loaders.formats.written_formats`.
    group_size, sym, bits, double_quant: see :class:`nybble.loaders.formats.WriteOptions`.
    calibration: token ids int64 ``(samples, length)``, for formats with a calibrated method. If
        None, weights are rounded to the nearest.
    settings: for formats calibrated by GPTQ.
    clip: for formats calibrated by AWQ: search how far to clip each group's weights, as in the
        paper.
    device: where the calibrated methods compute; the CPU if None.

    One decoder block at a time is in memory. Returns the error of every layer that calibration
    measured. Raises CheckpointError if the source is quantized already or a layer's sizes do
    not fit, FileExistsError if the target has content, ValueError for an option that the
    format does not take.
    """
    settings_given = settings is not None
    settings = settings or GptqSettings()
    options = WriteOptions(
        group_size=group_size,
        bits=bits,
        sym=sym,
        desc_act=settings.desc_act if calibration is not None and settings_given else None,
        double_quant=double_quant,
    )
    written = writing_format(format, options)
    _check_options(written, calibration, settings_given, clip)
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, FolderCheckpoint) or checkpoint.quantization is not None:
        raise CheckpointError(
            f"{source} is quantized already ({checkpoint.format}); give the 16-bit checkpoint"
        )
    config = config_to_write(source)
    config["quantization_config"] = dict(written.settings)
    shards = open_shards(source, checkpoint.architecture)
    checkpoint.check(shards)
    linears = {name + ".weight" for name in checkpoint.architecture.linears}
    for header in shards.headers():
        if header.name in linears:
            module = header.name.removesuffix(".weight")
            try:
                out, columns = header.shape
                written.check_sizes(out, columns)
            except ValueError as misfit:
                raise CheckpointError(f"{source}: {module}: {misfit}") from misfit
    parts = parts_to_write(shards, checkpoint.architecture, lambda linear: False)
    with folder_writer(target, source, config, parts=parts) as writer:
        for name, tensor in mtp_tensors(checkpoint):
            writer.add({name: tensor})
        if calibration is None:
            for name in track(shards.names(), "Quantizing", progress, unit="tensors"):
                tensor = shards.read(name)
                if name in linears:
                    module = name.removesuffix(".weight")
                    writer.add(written.tensors(module, round_to_nearest(tensor, written)))
                else:
                    writer.add({name: tensor})
            return []
        assert isinstance(written, AffineFormat)  # every format with a calibrated method is one
        writer.add({name: shards.read(name) for name in shards.names() if ".layers." not in name})
        errors: list[LayerError] = []
        blocks = DecoderLayers(source, device or torch.device("cpu"), calibration.shape[1])
        hidden = blocks.embed(calibration)
        for index in track(range(len(blocks)), "Quantizing", progress, unit="blocks"):
            block = blocks.load(index)
            if written.method == "gptq":
                layer = blocks.architecture.layers[index]
                quantized = _gptq_block(blocks, block, layer, hidden, written, settings)
                hidden = blocks.outputs(block, hidden)
            else:
                # Token 0 is left out: its few huge channels would dominate the scales.
                layer = blocks.architecture.layers[index]
                groups = blocks.groups(index)
                names = [group.linears[0].name for group in groups]
                statistics = blocks.statistics(block, hidden, names, first=1)
                searched = hidden[: max(1, _SEARCHED_TOKENS // hidden.shape[1])]
                modules = dict.fromkeys(
                    group.module for group in groups if group.fold and not group.fold.is_linear
                )
                outputs = blocks.module_outputs(block, searched, tuple(modules))
                # The next block's input is that of the full-precision model, as in the paper.
                hidden = blocks.outputs(block, hidden)
                rounded = awq_block(
                    block,
                    layer,
                    statistics,
                    outputs,
                    written.group_size,
                    norm_offset=blocks.architecture.norm.offset or 0.0,
                    clip=clip,
                )
                reached = {
                    linear.name: statistics[group.linears[0].name].tokens
                    for group in groups
                    for linear in group.linears
                }
                quantized = {
                    name: (weight, LayerError(name, error, reached[name]))
                    for name, (weight, error) in rounded.items()
                }
            prefix = blocks.architecture.module(index, "")
            for name, (weight, error) in quantized.items():
                writer.add(written.tensors(prefix + name, weight))
                error = replace(error, name=prefix + name)
                errors.append(error)
                if progress is True:
                    Bar.write(f"{error.name}: relative output error {error.relative:.2e}")
            others = block.state_dict()
            for name in quantized:
                del others[name + ".weight"]
            writer.add({prefix + name: tensor for name, tensor in others.items()})
            blocks.unload(index)
        _warn_of_few_tokens(errors, written)
        return errors


def _gptq_block(
    blocks: DecoderLayers,
    block: nn.Module,
    layer: Layer,
    hidden: Tensor,
    written: AffineFormat,
    settings: GptqSettings,
) -> dict[str, tuple[AffineWeight, LayerError]]:
    """Quantize the layers of ``block`` in place, those that share an input as one matrix.

    Returns the quantized weights and their relative errors by name.
    """
    result: dict[str, tuple[AffineWeight, LayerError]] = {}
    statistics: dict[str, InputStatistics] = {}
    stages = _stages(layer)
    if not settings.true_sequential:
        every = [group.linears[0].name for stage in stages for group in stage]
        statistics = blocks.statistics(block, hidden, every)
    for stage in stages:
        if settings.true_sequential:
            statistics = blocks.statistics(block, hidden, [g.linears[0].name for g in stage])
        for group in stage:
            found = statistics[group.linears[0].name]
            result |= _gptq_group(block, group, found, written, settings)
    return result


def _stages(layer: Layer) -> list[list[LinearGroup]]:
    """Groups that are quantized after one pass over the calibration tokens, in order.

    The experts' groups in the same place go together, as many as there is memory for.
    """
    stages = [[group] for group in layer.groups]
    if not isinstance(layer.mlp, Mixture):
        return stages
    for same in zip(*(expert.groups for expert in layer.mlp.experts), strict=True):
        at_once = max(1, _STATISTICS_BYTES // (4 * same[0].inputs ** 2))
        stages += [list(same[i : i + at_once]) for i in range(0, len(same), at_once)]
    return stages


def _gptq_group(
    block: nn.Module,
    group: LinearGroup,
    statistics: InputStatistics,
    written: AffineFormat,
    settings: GptqSettings,
) -> dict[str, tuple[AffineWeight, LayerError]]:
    moment = statistics.second_moment
    layers = {linear.name: linear_layer(block, linear.name) for linear in group.linears}
    weights = {name: layer.weight.detach().float() for name, layer in layers.items()}
    whole = gptq(
        torch.cat(list(weights.values())),
        moment,
        written.group_of(group.inputs),
        sym=written.sym,
        bits=written.bits,
        least_zero=written.least_zero,
        settings=settings,
    )
    result, start = {}, 0
    for name, weight in weights.items():
        part = whole.rows(start, start + len(weight))
        start += len(weight)
        rounded = part.dequantize()
        error = relative_error(rounded - weight, weight, moment)
        layers[name].weight.data = rounded.to(layers[name].weight.dtype)
        result[name] = (part, LayerError(name, error, statistics.tokens))
    return result


def _warn_of_few_tokens(errors: Sequence[LayerError], written: AffineFormat) -> None:
    """Name the experts whose calibration rests on fewer tokens than a group has inputs."""
    few = {
        error.name.rpartition(".")[0]: error.tokens
        for error in errors
        if error.tokens < max(written.group_size, 1)
    }
    if few:
        named = ", ".join(f"{name} ({tokens})" for name, tokens in sorted(few.items()))
        logger.warning(
            "%d experts saw fewer calibration tokens than a group has inputs (%d), so their "
            "weights are hardly better than rounded: %s. More or longer texts (--samples, "
            "--length, --text) would reach them",
            len(few),
            written.group_size,
            named,
        )


def _check_options(
    written: WritableFormat, calibration: Tensor | None, settings: bool, clip: bool
) -> None:
    if calibration is not None and written.method is None:
        raise ValueError(f"{written.name} takes no calibration text: its levels are fixed")
    if settings and (written.method != "gptq" or calibration is None):
        raise ValueError("GPTQ's settings need a format that GPTQ calibrates, and calibration text")
    if clip and (written.method != "awq" or calibration is None):
        raise ValueError("clipping needs a format that AWQ calibrates, and calibration text")
    if calibration is not None and calibration.shape[1] < 2:
        raise ValueError("calibration texts of one token say nothing")
