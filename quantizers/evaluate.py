"""What quantization costs: perplexity, divergence from the full-precision model, and size."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from nybble.kernels.progress import Bar
from nybble.loaders import open_checkpoint
from nybble.loaders.shards import Shards
from nybble.models import Mixture, architecture_of
from nybble.quantizers.packed_model import OutputLayer, load_packed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Splits a tensor's name into module and leaf. bitsandbytes names its state ``weight.…``, and the
# packed form puts a bar before its fields.
_TENSOR = re.compile(r"(.+?)(?:\.|\|)(weight\..+|\w+)")
_ROWS_AT_A_TIME = 256  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Measured:
    """A mean over windows and its standard error, from the spread of the windows."""

    value: float
    error: float


@dataclass(frozen=True)
class Evaluation:
    """The results of one checkpoint on a text.

    counts, losses, divergences: float64 ``(windows,)``: scored tokens of every window, and sums
        over them of −log p(token) and of KL(full precision ‖ this model), in nats.
    size: bytes of the checkpoint's weights.
    bits_per_weight: of the decoder's linear layers on disk, scales and zeros included.
    tokens_per_second: through the decoder's layers, whole windows at once.
    """

    name: str
    counts: Tensor
    losses: Tensor
    divergences: Tensor
    size: int
    bits_per_weight: float
    tokens_per_second: float

    @property
    def scored_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(_mean(self.losses, self.counts).value)

    @property
    def kl_divergence(self) -> Measured:
        """Mean over the scored tokens."""
        return _mean(self.divergences, self.counts)

    def perplexity_ratio(self, baseline: Evaluation) -> Measured:
        """This model's perplexity over the baseline's, on the same windows.

        Its standard error comes from paired differences of the losses, so it is far smaller than
        that of either perplexity: a text hard for one model is hard for the other too.
        """
        change = _mean(self.losses - baseline.losses, self.counts)
        ratio = math.exp(change.value)
        return Measured(ratio, ratio * change.error)

    def divergence_difference(self, baseline: Evaluation) -> Measured:
        """This model's divergence less the baseline's, on the same windows."""
        return _mean(self.divergences - baseline.divergences, self.counts)


def _mean(sums: Tensor, counts: Tensor) -> Measured:
    """Mean per token from sums over windows; tokens of one window are not independent."""
    mean, windows = float(sums.sum() / counts.sum()), len(counts)
    if windows == 1:
        return Measured(mean, math.nan)
    residuals = (sums - mean * counts).square().sum() * windows / (windows - 1)
    return Measured(mean, float(residuals.sqrt() / counts.sum()))


@dataclass(frozen=True)
class Window:
    """Tokens ``start``…``stop``−1 are read; those from ``scored`` on are predicted and counted."""

    start: int
    scored: int
    stop: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Windows of ``length`` every ``stride`` tokens, each scoring tokens not scored before.

    With ``stride == length`` they do not overlap, which is how the GPTQ and AWQ papers measure.
    The first token of a window has nothing to be predicted from.
    """
    if not 0 < stride <= length:
        raise ValueError(f"stride {stride} must be between 1 and the window's length {length}")
    result: list[Window] = []
    for start in range(0, tokens, stride):
        stop = min(start + length, tokens)
        scored = max(start + 1, result[-1].stop if result else 0)
        if scored < stop:
            result.append(Window(start, scored, stop))
        if stop == tokens:
            break
    if not result:
        raise ValueError(f"a text of {tokens} tokens in windows of {length} predicts nothing")
    return result


def evaluate(
    reference: Path,
    others: Mapping[str, Path],
    token_ids: Tensor,
    *,
    length: int = 2048,
    stride: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    reference_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[Evaluation]:
    """Measure ``reference`` (full precision) and ``others``, by name, on ``token_ids (tokens,)``.

    length, stride: of the sliding window; ``stride`` is ``length`` if None.
    dtype: what models compute in.
    reference_dtype: what the reference computes in. If it differs from ``dtype``, the reference is
        also measured in ``dtype``, as the second result, and both names include the dtype.

    One model is in memory at a time. Of the reference, the head and the last hidden states are
    kept: logits would be vocab / hidden times as large. Raises CheckpointError for a folder that
    cannot be loaded, ValueError if a vocabulary is not the reference's.
    """
    places = windows(len(token_ids), length, stride or length)
    device = device or torch.device("cpu")
    models = [("full precision", reference, dtype)]
    if reference_dtype is not None and reference_dtype != dtype:
        models = [
            (str(of).removeprefix("torch."), reference, of) for of in (reference_dtype, dtype)
        ]
    models += [(name, folder, dtype) for name, folder in others.items()]
    expected: list[Tensor] = []
    reference_logits: OutputLayer | None = None
    results = []
    for name, folder, computing in models:
        model = load_packed_model(open_checkpoint(folder), device=device, dtype=computing)
        logits_of = OutputLayer.of(model)
        if reference_logits is None:
            reference_logits = logits_of
        elif logits_of.vocab != reference_logits.vocab:
            raise ValueError(
                f"{folder} has a vocabulary of {logits_of.vocab}, the full-precision model one "
                f"of {reference_logits.vocab}: they cannot be compared"
            )
        losses, divergences, seconds = [], [], 0.0
        for index, window in enumerate(
            Bar(places, f"Evaluating {name}", unit=" windows", disable=not progress)
        ):
            begin = time.perf_counter()
            ids = token_ids[window.start : window.stop].to(device)
            with torch.no_grad():
                hidden = model.base_model(ids[None], use_cache=False).last_hidden_state[0]
            first = window.scored - window.start
            predicting, labels = hidden[first - 1 : -1], ids[first:]
            seconds += time.perf_counter() - begin
            if len(expected) == index:
                expected.append(predicting)
            sums = _losses(logits_of, predicting, reference_logits, expected[index], labels)
            losses.append(sums[0])
            divergences.append(sums[1])
        read = sum(window.stop - window.start for window in places)
        size, bits = _sizes(folder, model)
        results.append(
            Evaluation(
                name=name,
                counts=torch.tensor([w.stop - w.scored for w in places], dtype=torch.float64),
                losses=torch.tensor(losses, dtype=torch.float64),
                divergences=torch.tensor(divergences, dtype=torch.float64),
                size=size,
                bits_per_weight=bits,
                tokens_per_second=read / seconds,
            )
        )
    return results


@torch.no_grad()
def _losses(
    logits_of: OutputLayer,
    hidden: Tensor,
    reference_logits: OutputLayer,
    expected: Tensor,
    labels: Tensor,
) -> tuple[float, float]:
    """Sums over rows of −log p(label) and of KL(expected ‖ found), from hidden states."""
    loss = divergence = 0.0
    for start in range(0, len(labels), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        found = log_softmax(logits_of(hidden[rows]), dim=-1)
        loss += float(cross_entropy(found, labels[rows], reduction="sum"))
        if hidden is not expected:
            target = log_softmax(reference_logits(expected[rows]), dim=-1)
            divergence += float(kl_div(found, target, reduction="sum", log_target=True))
    return loss, divergence


def _sizes(folder: Path, model: PreTrainedModel) -> tuple[int, float]:
    """Bytes of all weights, and bits per weight of the linear layers within the decoder."""
    shards = Shards(folder)
    architecture = architecture_of(model.config)
    fused = {name for name, _ in architecture.fused.values()}  # in the packed form
    stacked = {
        architecture.module(index, each.name)
        for index, layer in enumerate(architecture.layers)
        if isinstance(layer.mlp, Mixture)
        for each in layer.mlp.stacked
    }
    weights = sum(linear.out * linear.inputs for linear in architecture.linears.values())
    total = linear = 0
    for name in shards.names():
        size = shards.read(name).nbytes
        total += size
        if name in stacked:
            linear += size
            continue
        owner = _TENSOR.fullmatch(name)
        if owner is None:
            continue
        module, field = owner.groups()
        if (module in architecture.linears or module in fused) and field != "bias":
            linear += size
    return total, 8 * linear / weights


def table(evaluations: Sequence[Evaluation], baseline: Evaluation | None = None) -> str:
    """As a Markdown table; ± is one standard error.

    baseline: the model that the others' perplexities are divided by, and whose divergence is
    subtracted from theirs; the first if None.
    """
    reference = evaluations[0]
    baseline = baseline or reference
    against = baseline is not reference
    rows = [
        (
            *("model", "perplexity", f"÷ {baseline.name}", "KL divergence"),
            *([f"− {baseline.name}"] if against else []),
            *("size, MB", "bits per weight", "tokens/s"),
        )
    ]
    rows.append(("---", *["---:"] * (len(rows[0]) - 1)))
    for found in evaluations:
        row = [found.name, f"{found.perplexity:.3f}"]
        same = found is baseline
        row.append("" if same else _with_error(found.perplexity_ratio(baseline)))
        row.append("" if found is reference else _with_error(found.kl_divergence))
        if against:
            of_interest = not same and found is not reference
            row.append(_with_error(found.divergence_difference(baseline)) if of_interest else "")
        row.append(f"{found.size / 1e6:.0f}")
        row += [f"{found.bits_per_weight:.3f}", f"{found.tokens_per_second:.0f}"]
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for entries in rows:
        cells = [entries[0].ljust(widths[0]), *map(str.rjust, entries[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_error(measured: Measured) -> str:
    return f"{measured.value:.4f} ± {measured.error:.4f}"


def plot(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Perplexity and divergence over bits per weight, as an image in the format of its suffix.

    Bars are two standard errors to either side. Raises ModuleNotFoundError if matplotlib is not
    installed.
    """
    from matplotlib.figure import Figure

    reference, *others = evaluations
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(reference.perplexity, color="grey", linestyle="--", label=reference.name)
    left.set_ylabel("perplexity")
    right.set_ylabel("KL divergence, nats per token")
    for found in others:
        ratio, divergence = found.perplexity_ratio(reference), found.kl_divergence
        for axes, value, error in (
            (left, found.perplexity, reference.perplexity * ratio.error),
            (right, divergence.value, divergence.error),
        ):
            width, bar = found.bits_per_weight, 2 * error
            axes.errorbar(width, value, yerr=bar, fmt="o", capsize=3, label=found.name)
    for axes in (left, right):
        axes.set_xlabel("bits per weight on disk")
        axes.margins(0.2)
    # A legend, because names beside the points would overlap: 4-bit models lie close together.
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)
