"""Quantization-aware training: weights are trained on the grid they will be stored on.

The forward pass uses weights rounded to a fixed grid; the backward pass treats
rounding as the identity within the grid's range and as a constant beyond it (the straight-through
estimator, Bengio, Léonard, Courville 2013; Jacob et al. 2018). What is exported is what was
trained: rounding again changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nybble.finetune.data import IGNORED, Batch, Example, pack, read_examples, to_batch
from nybble.finetune.train import (
    batch_loss,
    checkpoint_activations,
    hidden_states,
    packs,
    training_mode,
    warm_cosine,
)
from nybble.kernels.progress import Bar
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.experts import open_shards
from nybble.loaders.formats import (
    AffineFormat,
    AffineWeight,
    WriteOptions,
    writing_format,
)
from nybble.loaders.model_config import config_to_write
from nybble.loaders.mtp import mtp_tensors
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import architecture_of
from nybble.quantizers.affine import grid, nearest_codes
from nybble.quantizers.packed_model import OutputLayer, load_packed_model, training_dtype
from nybble.quantizers.writer import folder_writer

_ROWS_AT_A_TIME = 256  # tokens whose logits are in memory at once


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grouped: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
        low = -zeros * scales
        high = (2**bits - 1 - zeros) * scales
        # Values up to half a step beyond an end still round to it.
        ctx.save_for_backward((grouped >= low - scales / 2) & (grouped <= high + scales / 2))
        return (nearest_codes(grouped, scales, zeros, bits=bits) - zeros) * scales

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


class FakeQuantLinear(nn.Module):
    """A linear layer whose float32 weight is rounded to its grid in every forward pass.

    The grid is computed from the initial weight and stays fixed.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        group_size: int,
        *,
        sym: bool,
        bits: int = 4,
        least_zero: int = 0,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group_size = linear.in_features if group_size == -1 else group_size
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        self.bias = linear.bias
        grouped = self._grouped().detach()
        scales, zeros = grid(
            grouped.amin(-1, keepdim=True),
            grouped.amax(-1, keepdim=True),
            sym=sym,
            bits=bits,
            least_zero=least_zero,
        )
        self.register_buffer("scales", scales.float())
        self.register_buffer("zeros", zeros.float())

    def _grouped(self) -> Tensor:
        return self.weight.view(self.out_features, -1, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _RoundToGrid.apply(self._grouped(), self.scales, self.zeros, self.bits)  # type: ignore[no-untyped-call]
        weight = rounded.view_as(self.weight).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    def export(self) -> AffineWeight:
        """The codes, scales and zeros the forward pass has been using."""
        with torch.no_grad():
            codes = nearest_codes(self._grouped(), self.scales, self.zeros, bits=self.bits)
        return AffineWeight(
            codes=codes.to(torch.uint8).view_as(self.weight),
            scales=self.scales[..., 0].half(),
            zeros=self.zeros[..., 0].to(torch.uint8),
            g_idx=torch.arange(self.in_features, device=codes.device) // self.group_size,
            bits=self.bits,
        )


def fake_quantize_model(
    model: PreTrainedModel, group_size: int, *, sym: bool = False, bits: int = 4
) -> dict[str, FakeQuantLinear]:
    """Replace the decoder's linear layers in place; returns the new ones by name.

    They are those that ``nybble quantize`` rounds: others, such as routers, stay as they are.
    """
    layers = {}
    written = _exported(group_size, sym, bits)
    for name in architecture_of(model.config).linears:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        try:
            written.check_sizes(linear.out_features, linear.in_features)
        except ValueError as misfit:
            raise ValueError(f"{name}: {misfit}") from misfit
        layers[name] = FakeQuantLinear(
            linear, group_size, sym=sym, bits=bits, least_zero=written.least_zero
        )
        model.set_submodule(name, layers[name])
    return layers


def _exported(group_size: int, sym: bool, bits: int) -> AffineFormat:
    """The format that the result is written in. Raises ValueError for an unsupported width."""
    written = writing_format("gptq", WriteOptions(group_size=group_size, sym=sym, bits=bits))
    assert isinstance(written, AffineFormat)
    return written


@dataclass(frozen=True)
class QatSettings:
    """How training goes.

    bits: the width of a code: 2, 3, 4 or 8.
    distil: learn the full-precision model's distribution over the next token (the loss is
        KL(full precision ‖ trained)) instead of the text itself. The weights adapt to the grid,
        and the model's behaviour stays the same.
    warmup: the fraction of the steps in which the rate rises; it then falls along a cosine.
    """

    group_size: int = 128
    sym: bool = False
    bits: int = 4
    distil: bool = False
    learning_rate: float = 1e-5
    steps: int = 100
    batch_size: int = 1
    max_length: int = 512
    max_grad_norm: float = 1.0
    warmup: float = 0.05
    gradient_checkpointing: bool = True
    seed: int = 0


def quantization_aware_train(
    base: Path,
    data: Path,
    out: Path,
    *,
    settings: QatSettings | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Train the linear layers of the 16-bit checkpoint ``base`` on their grid.

    ``out`` becomes a GPTQ-layout checkpoint with exactly the rounded weights of training.
    Returns the loss per token of every step. Memory: 16 bytes a weight, for the float32 weight,
    its gradient and Adam's two moments; with ``distil`` 2 more for the full-precision model.

    Raises CheckpointError if the base is quantized already, DataError for data that cannot be
    used, FileExistsError if ``out`` has content, ValueError if sizes do not fit.
    """
    settings = settings or QatSettings()
    written = _exported(settings.group_size, settings.sym, settings.bits)
    source = open_checkpoint(base)
    architecture = architecture_of(source.config)
    if source.format != "none":
        raise CheckpointError(f"{base} is quantized already; give the 16-bit checkpoint")
    config = config_to_write(base)
    config["quantization_config"] = dict(written.settings)
    packing = packs(architecture, None)
    with folder_writer(out, base, config) as writer:
        tokenizer = load_tokenizer(base)
        examples = read_examples(data, tokenizer, max_length=settings.max_length)
        device = device or torch.device("cpu")
        dtype = dtype or training_dtype(device)
        model = load_packed_model(source, device=device, dtype=dtype)
        layers = fake_quantize_model(
            model, settings.group_size, sym=settings.sym, bits=settings.bits
        )
        teacher = None
        if settings.distil:
            teacher = load_packed_model(source, device=device, dtype=dtype)
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        training_mode(model)
        parameters = [layer.weight for layer in layers.values()]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        schedule = warm_cosine(optimizer, settings.warmup, settings.steps)
        order = random.Random(settings.seed)
        rows: list[list[Example]] = []
        losses: list[float] = []
        bar = Bar(range(settings.steps), "Training", unit=" steps", disable=not progress)
        for _ in bar:
            if len(rows) < settings.batch_size:
                shuffled = order.sample(examples, len(examples))
                apart = [[example] for example in shuffled]
                rows += pack(shuffled, settings.max_length) if packing else apart
            batch = to_batch([rows.pop(0) for _ in range(min(settings.batch_size, len(rows)))])
            if teacher is None:
                loss = batch_loss(model, batch, device) / batch.targets
            else:
                loss = batch_divergence(model, teacher, batch, device) / batch.targets
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        for name, tensor in mtp_tensors(source):
            writer.add({name: tensor})
        shards = open_shards(base, architecture)
        for name in shards.names():
            if name.removesuffix(".weight") not in layers:
                writer.add({name: shards.read(name)})
        for name, layer in layers.items():
            writer.add(written.tensors(name, layer.export()))
    return losses


def batch_divergence(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, device: torch.device
) -> Tensor:
    """Sum of KL(teacher ‖ model) over the batch's labelled tokens; logits exist in parts only."""
    learned = batch.labels[:, 1:].to(device) != IGNORED

    def predicting(source: PreTrainedModel) -> Tensor:
        return hidden_states(source, batch, device)[:, :-1][learned]

    with torch.no_grad():
        expected = predicting(teacher)
    found = predicting(model)

    taught, logits_of = OutputLayer.of(teacher), OutputLayer.of(model)

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        target = log_softmax(taught(wanted), dim=-1)
        return kl_div(
            log_softmax(logits_of(rows), dim=-1), target, reduction="sum", log_target=True
        )

    total: Tensor = found.new_zeros((), dtype=torch.float32)
    for start in range(0, len(found), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        total = total + checkpoint(part, found[rows], expected[rows], use_reentrant=False)
    return total
