"""AWQ: weights of large inputs are rounded more finely, by scales folded into the layer before.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration".
Layers that share a norm are scaled together. Their scale minimizes the error of the module's
output: the attention's for q, k and v, the MLP's for gate and up. For a layer by itself the error
of its outputs is computed from XᵀX with the calibration inputs X:
‖X(Ŵ − W)ᵀ‖² = tr((Ŵ − W) XᵀX (Ŵ − W)ᵀ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nybble.loaders.formats import AffineWeight
from nybble.models import Attention, Fold, LatentAttention, Layer, LinearGroup
from nybble.quantizers.affine import round_trip
from nybble.quantizers.layers import InputStatistics, linear_layer, output_error, relative_error
from nybble.quantizers.rtn import quantize_affine

_STEPS = 20
_SEARCHED_OUTPUTS = 512
_CLIP_STEPS = 10  # down to 0.55 of the largest weight
_ROWS_AT_A_TIME = 1024


def search_scale(weight: Tensor, statistics: InputStatistics, group_size: int) -> Tensor:
    """The scale s (in,) = mean|x|^α, α on a grid, with the least error of Q(W·s)/s."""
    # The error is a sum over outputs: a sample of them is enough to find the scale.
    weight = weight[:: -(-len(weight) // _SEARCHED_OUTPUTS)]

    def error(scale: Tensor) -> float:
        difference = _rounded_with(scale, weight, group_size) - weight
        return output_error(difference, statistics.second_moment)

    return _best_scale(statistics.mean_abs, error)


def search_common_scale(
    layers: Sequence[nn.Linear],
    mean_abs: Tensor,
    group_size: int,
    outputs: Callable[[], Tensor],
) -> Tensor:
    """As :func:`search_scale` for layers that share an input, by their module's output error.

    outputs: computes the module's output ``(samples, length, …)`` with the layers' weights at the
        time of the call. The first token of a sequence is left out.
    """
    originals = [layer.weight.data for layer in layers]
    expected = outputs()[:, 1:].float()

    def error(scale: Tensor) -> float:
        for layer, weight in zip(layers, originals, strict=True):
            rounded = _rounded_with(scale, weight.float(), group_size)
            layer.weight.data = rounded.to(weight.dtype)
        return float((outputs()[:, 1:].float() - expected).square().mean())

    try:
        return _best_scale(mean_abs, error)
    finally:
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = weight


def _best_scale(mean_abs: Tensor, error: Callable[[Tensor], float]) -> Tensor:
    best, lowest = None, float("inf")
    for step in range(_STEPS):
        scale = _normalised(mean_abs.clamp(min=1e-4) ** (step / _STEPS))
        found = error(scale)
        if found < lowest:
            best, lowest = scale, found
    if best is None:
        raise ValueError("the calibration inputs or the weights are not finite")
    return best


def _rounded_with(scale: Tensor, weight: Tensor, group_size: int) -> Tensor:
    size = weight.shape[1] if group_size == -1 else group_size
    grouped = (weight * scale).view(len(weight), -1, size)
    return round_trip(grouped, sym=False).view_as(weight) / scale


def search_clip(weight: Tensor, second_moment: Tensor, group_size: int) -> Tensor:
    """``weight (out, in)`` with each group clipped if that lowers the group's output error."""
    columns = weight.shape[1]
    groups = columns // group_size
    index = torch.arange(groups, device=second_moment.device)
    # (groups, group_size, group_size): inputs of different groups are taken as uncorrelated.
    moments = second_moment.view(groups, group_size, groups, group_size)[index, :, index]
    return torch.cat(
        [_clip_rows(rows, moments, group_size) for rows in torch.split(weight, _ROWS_AT_A_TIME)]
    )


def _clip_rows(weight: Tensor, moments: Tensor, group_size: int) -> Tensor:
    grouped = weight.view(len(weight), -1, group_size)
    largest = grouped.abs().amax(-1, keepdim=True)
    best = weight.clone().view_as(grouped)
    lowest = torch.full_like(largest, float("inf"))
    for step in range(_CLIP_STEPS):
        limit = largest * (1 - step / _STEPS)
        clipped = grouped.clamp(-limit, limit)
        difference = (round_trip(clipped, sym=False) - grouped).transpose(0, 1)
        errors = ((difference @ moments) * difference).sum(-1).T[..., None]
        better = errors < lowest
        lowest = torch.where(better, errors, lowest)
        best = torch.where(better, clipped, best)
    return best.reshape(weight.shape)


def awq_block(
    block: nn.Module,
    layer: Layer,
    statistics: dict[str, InputStatistics],
    outputs: dict[str, Callable[[], Tensor]],
    group_size: int,
    *,
    norm_offset: float = 0.0,
    clip: bool = False,
) -> dict[str, tuple[AffineWeight, float]]:
    """Scale, clip if asked, and round the linear layers of a decoder block.

    Returns the quantized weights and their relative output errors by name in the block. The other
    arguments are :func:`scale_block`'s. Norms and biases of ``block`` are changed to those the
    checkpoint needs; the linear layers' weights are left scaled and not rounded.
    """
    scaled = scale_block(block, layer, statistics, outputs, group_size, norm_offset=norm_offset)
    result = {}
    for group in _groups(layer):
        kept = _unclipped(layer, group)
        for linear in group.linears:
            weight, moment = scaled[linear.name]
            size = weight.shape[1] if group_size == -1 else group_size
            clipped = weight
            if clip and kept < linear.out:
                clipped = torch.cat((weight[:kept], search_clip(weight[kept:], moment, size)))
            kept = max(0, kept - linear.out)
            rounded = quantize_affine(clipped, size, sym=False)
            error = relative_error(rounded.dequantize() - weight, weight, moment)
            result[linear.name] = (rounded, error)
    return result


def _unclipped(layer: Layer, group: LinearGroup) -> int:
    """The first outputs of a group which are not clipped: those of queries and keys.

    They are multiplied with each other, so errors grow.
    """
    for mixer in layer.mixers:
        if isinstance(mixer, Attention) and group is mixer.qkv:
            return group.out - mixer.kv_heads * mixer.head_dim
        if isinstance(mixer, LatentAttention) and group in mixer.groups[:-1]:
            return group.out
    return 0


def scale_block(
    block: nn.Module,
    layer: Layer,
    statistics: dict[str, InputStatistics],
    outputs: dict[str, Callable[[], Tensor]],
    group_size: int,
    *,
    norm_offset: float = 0.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Fold searched scales into norms and linear layers: the block computes what it did before.

    Returns float32 weights ``(out, in)`` by name, with XᵀX of their new inputs.

    layer: the parts of the block; a group of linear layers is scaled if it has a fold.
    statistics: of the inputs of each group, by its first linear layer's name.
    outputs: of the modules that hold the groups behind a norm (attention, MLP), by their names.
    norm_offset: what the norms add to their stored weight.
    """
    weights = {
        linear.name: linear_layer(block, linear.name).weight.detach().to(torch.float32, copy=True)
        for linear in layer.linears
    }
    moments = {
        linear.name: statistics[group.linears[0].name].second_moment
        for group in _groups(layer)
        for linear in group.linears
    }

    def multiply_inputs(scale: Tensor, group: LinearGroup) -> None:
        moment = moments[group.linears[0].name] / torch.outer(scale, scale)
        for linear in group.linears:
            weights[linear.name] *= scale
            moments[linear.name] = moment

    def divide_outputs(scale: Tensor, fold: Fold) -> None:
        rows = slice(fold.start, fold.stop)
        weights[fold.module][rows] /= scale[:, None]
        bias = linear_layer(block, fold.module).bias
        if isinstance(bias, Tensor):
            bias.data[rows] = (bias.data[rows].float() / scale).to(bias.dtype)

    behind_norms = [(g, g.fold) for g in _groups(layer) if g.fold and not g.fold.is_linear]
    behind_linears = [(g, g.fold) for g in _groups(layer) if g.fold and g.fold.is_linear]
    # Search before folding: all searches run the block's own modules, which must be unchanged.
    common = [
        search_common_scale(
            [linear_layer(block, linear.name) for linear in group.linears],
            statistics[group.linears[0].name].mean_abs,
            group_size,
            outputs[group.module],
        )
        for group, _ in behind_norms
    ]
    for (group, fold), scale in zip(behind_norms, common, strict=True):
        norm = block.get_submodule(fold.module)
        multiply_inputs(_fold_into_norm(norm, scale, norm_offset), group)
    for group, fold in behind_linears:
        # Inputs from the same row before (query heads that share a value head) share a scale.
        (linear,) = group.linears
        inputs = statistics[linear.name]
        by_row = inputs.mean_abs.view(-1, fold.shared, fold.run)
        shared = by_row.mean(1, keepdim=True).expand_as(by_row).flatten()
        scale = search_scale(weights[linear.name], replace(inputs, mean_abs=shared), group_size)
        multiply_inputs(scale, group)
        divide_outputs(scale.view_as(by_row)[:, 0].flatten(), fold)
    return {name: (weight, moments[name]) for name, weight in weights.items()}


def _groups(layer: Layer) -> tuple[LinearGroup, ...]:
    """All linear layers; of a mixture, each expert's down projection is scaled by itself."""
    return (*layer.groups, *layer.expert_groups)


def _fold_into_norm(norm: nn.Module, scale: Tensor, offset: float) -> Tensor:
    """Divide a norm's weight by ``scale``; returns the scale after the weight is rounded.

    The norm is stored in 16 bits. Scaling the next weights, not rounded yet, by the returned scale
    compensates for its rounding: folding is exact in the stored precision too. Only a LayerNorm's
    bias is rounded once more.
    """
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, nn.Parameter)
    before = weight.data.float() + offset
    folded = (before / scale - offset).to(weight.dtype)
    after = folded.float() + offset
    exact = torch.where(after == 0, scale, before / after)
    weight.data = folded
    if isinstance(bias, nn.Parameter):
        bias.data = (bias.data.float() / exact).to(bias.dtype)
    return exact


def _normalised(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()
