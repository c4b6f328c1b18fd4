"""QLoRA: trains adapters on a frozen base, packed in 4 bits or in 16."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from nybble.finetune.data import IGNORED, Batch, Example, pack, read_examples, to_batch
from nybble.finetune.identity import base_digest
from nybble.finetune.lora import (
    LoRALinear,
    LoRASettings,
    adapter_tensors,
    add_lora,
    optimizer_groups,
    restore_adapter,
    save_adapter,
)
from nybble.kernels.progress import Bar
from nybble.loaders import open_checkpoint
from nybble.loaders.output_folder import make_writable
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import Architecture, Mixture, Recurrent, architecture_of
from nybble.quantizers.packed_model import (
    OutputLayer,
    PackedLinear,
    load_packed_model,
    training_dtype,
)

logger = logging.getLogger(__name__)

# Of a run whose losses never fell below that of the base.
NOTHING_LEARNED = (
    "no evaluation was better than the start, so the adapter changes nothing: try a lower learning "
    "rate, or data that the base does not say already"
)

_ROWS_AT_A_TIME = 256  # tokens whose logits are in memory at once
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class FinetuneSettings:
    """How training goes.

    learning_rate: at the end of the warm-up, for A; B's is ``lora_plus`` times that.
    lora_plus: λ of LoRA+; 1 is plain LoRA.
    batch_size, accumulation: rows in a forward pass, and such passes in a step. The loss of a step
        is the mean over all its tokens, however they are divided between passes.
    max_length: tokens in a row.
    packing: rows hold as many examples as fit. None: if the model keeps them apart.
    max_steps: 0 for as many as ``epochs`` takes.
    warmup: the fraction of the steps in which the rate rises; it then falls along a cosine.
    eval_every: steps between evaluations; 0: ten in a run, or every 25 steps if that is more often.
    eval_fraction: of the examples, held out if no evaluation file is given.
    patience: evaluations without a better held-out loss before training stops; 0 for never.
    """

    lora: LoRASettings = field(default_factory=LoRASettings)
    learning_rate: float = 5e-5
    lora_plus: float = 16.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 3
    max_steps: int = 0
    batch_size: int = 1
    accumulation: int = 8
    max_length: int = 1024
    packing: bool | None = None
    warmup: float = 0.05
    eval_every: int = 0
    eval_fraction: float = 0.05
    patience: int = 3
    gradient_checkpointing: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """Losses per token at one step: training, and held-out after it if it was measured."""

    step: int
    train_loss: float | None
    eval_loss: float | None


@dataclass(frozen=True)
class Progress:
    """A finished step: ``point.step`` of ``steps``.

    learning_rate: A's in that step.
    tokens: read for training so far; every epoch counts.
    """

    point: Point
    steps: int
    epoch: float
    learning_rate: float
    tokens: int


@dataclass(frozen=True)
class FinetuneResult:
    """The losses of a run; the adapter saved is the one at ``best_step``.

    steps: of the whole run; ``history`` ends earlier if patience did.
    best_step: 0 if nothing was better than the start; the adapter then changes nothing.
    tokens: read for training; every epoch counts.
    base_bytes: bytes of the frozen model.
    peak_bytes: the peak memory of this process: the GPU's if it trains on one, else resident.
    """

    history: tuple[Point, ...]
    steps: int
    best_step: int
    best_eval_loss: float
    trained_parameters: int
    tokens: int
    base_bytes: int = field(compare=False)
    peak_bytes: int = field(compare=False)


def finetune(
    base: Path,
    data: Path,
    out: Path,
    *,
    settings: FinetuneSettings | None = None,
    eval_data: Path | None = None,
    resume: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> FinetuneResult:
    """Train an adapter for the checkpoint ``base`` on JSON lines and save it to ``out``.

    out: gets the adapter with the lowest held-out loss in PEFT's format and ``history.json``. While
        training runs it has a ``checkpoint.pt``. ``resume`` continues from it to the same result.
    dtype: of the activations; :func:`training_dtype` of the device if it is not given. Adapters and
        optimizer states are float32.
    on_step: called after every step. A resumed run first repeats the steps before its checkpoint,
        because the callback may have missed some.

    Raises DataError for data that cannot be used, CheckpointError for a base that cannot be
    loaded, FileExistsError if ``out`` has content, OSError if it cannot be written,
    FileNotFoundError for a resume without a checkpoint, ValueError for a resume with another base,
    other data or other settings, and for packing with a model that would mix examples.
    """
    settings = settings or FinetuneSettings()
    saved = out / CHECKPOINT
    if resume and not saved.is_file():
        raise FileNotFoundError(f"{saved} is not there: there is no training run to resume")
    if not resume and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; resume, or give another folder")
    source = open_checkpoint(base)
    packing = packs(architecture_of(source.config), settings.packing)
    settings = replace(settings, packing=packing)
    tokenizer = load_tokenizer(base)
    examples = read_examples(data, tokenizer, max_length=settings.max_length)
    if eval_data is None:
        examples, held_out = _split(examples, settings)
    else:
        held_out = read_examples(eval_data, tokenizer, max_length=settings.max_length)
    make_writable(out)
    torch.manual_seed(settings.seed)
    device = device or torch.device("cpu")
    dtype = dtype or training_dtype(device)
    model = load_packed_model(source, device=device, dtype=dtype)
    layers = add_lora(model, settings.lora)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    run = _Run(base, model, layers, examples, held_out, settings, device)
    if resume:
        run.load(saved)
    return run.train(out, progress=progress, on_step=on_step)


def _split(
    examples: list[Example], settings: FinetuneSettings
) -> tuple[list[Example], list[Example]]:
    shuffled = random.Random(settings.seed).sample(examples, len(examples))
    held_out = max(1, round(len(examples) * settings.eval_fraction))
    if len(examples) < 2:
        # A single example cannot be split: it is both trained on and evaluated.
        return examples, examples
    return shuffled[held_out:], shuffled[:held_out]


class _Run:
    """A training run: all state that a checkpoint has to restore."""

    def __init__(
        self,
        base: Path,
        model: PreTrainedModel,
        layers: Mapping[str, LoRALinear],
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: FinetuneSettings,
        device: torch.device,
    ) -> None:
        self._model, self._layers, self._settings, self._device = model, layers, settings, device
        self._base_bytes = _frozen_bytes(model)
        self._examples = examples
        self._held_out = self._passes(self._rows(held_out))
        rows = len(self._rows(examples))
        self._base = {"name": str(base), "digest": base_digest(base)}
        # A run can be resumed only if this is the same.
        content = repr((settings, [(one.ids, one.labels) for one in (*examples, *held_out)]))
        self._identity = hashlib.sha256(content.encode()).hexdigest()
        self._steps_per_epoch = -(-rows // (settings.batch_size * settings.accumulation))
        self.steps = settings.max_steps or settings.epochs * self._steps_per_epoch
        self._eval_every = settings.eval_every or min(25, math.ceil(self.steps / 10))
        groups = optimizer_groups(layers, settings.learning_rate, settings.lora_plus)
        self._optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self._schedule = warm_cosine(self._optimizer, settings.warmup, self.steps)
        self._step = self._tokens = 0
        self._history: list[Point] = []
        self._told: list[Progress] = []
        self._best: dict[str, Tensor] = adapter_tensors(layers)
        self._best_step, self._best_loss = 0, math.inf

    def train(
        self, out: Path, *, progress: bool, on_step: Callable[[Progress], None]
    ) -> FinetuneResult:
        settings = self._settings
        if not self._history:
            self._best_loss = self._evaluate()
            self._history.append(Point(0, None, self._best_loss))
        bar = Bar(
            total=self.steps,
            initial=self._step,
            desc="Training",
            unit=" steps",
            disable=not progress,
        )
        # The callback may have missed steps of the interrupted run: repeat them.
        for made in self._told:
            on_step(made)
        for batches in self._batches():
            if self._out_of_patience():
                break
            rate = float(self._schedule.get_last_lr()[0])
            loss = self._update(batches)
            self._step += 1
            self._tokens += sum(batch.tokens for batch in batches)
            measured = None
            if self._step % self._eval_every == 0 or self._step == self.steps:
                measured = self._evaluate()
                if measured < self._best_loss:
                    self._best, self._best_step = adapter_tensors(self._layers), self._step
                    self._best_loss = measured
            point = Point(self._step, loss, measured)
            self._history.append(point)
            epoch = self._step / self._steps_per_epoch
            self._told.append(Progress(point, self.steps, epoch, rate, self._tokens))
            bar.set_postfix(
                loss=f"{loss:.3f}", held_out=f"{self._last_measured():.3f}", refresh=False
            )
            bar.update()
            if measured is not None:
                self.save(out / CHECKPOINT)
            on_step(self._told[-1])
        bar.close()
        architecture = architecture_of(self._model.config)
        save_adapter(out, self._best, settings.lora, self._base["name"], architecture)
        history = [asdict(point) for point in self._history]
        (out / "history.json").write_text(json.dumps(history, indent=1))
        (out / CHECKPOINT).unlink(missing_ok=True)
        return FinetuneResult(
            history=tuple(self._history),
            steps=self.steps,
            best_step=self._best_step,
            best_eval_loss=self._best_loss,
            trained_parameters=sum(
                layer.lora_A.numel() + layer.lora_B.numel() for layer in self._layers.values()
            ),
            tokens=self._tokens,
            base_bytes=self._base_bytes,
            peak_bytes=_peak_bytes(self._device),
        )

    def _rows(self, examples: Sequence[Example]) -> list[list[Example]]:
        if self._settings.packing:
            return pack(examples, self._settings.max_length)
        return [[example] for example in examples]

    def _passes(self, rows: Sequence[list[Example]]) -> list[Batch]:
        size = self._settings.batch_size
        return [to_batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _batches(self) -> Iterator[list[Batch]]:
        """The passes of every remaining step; an epoch's order depends only on its number."""
        settings = self._settings
        while self._step < self.steps:
            epoch, done = divmod(self._step, self._steps_per_epoch)
            order = random.Random(f"{settings.seed} {epoch}")
            rows = self._rows(order.sample(self._examples, len(self._examples)))
            passes = self._passes(rows)
            steps = [
                passes[start : start + settings.accumulation]
                for start in range(0, len(passes), settings.accumulation)
            ]
            # With packing, another order may give a row more or less.
            steps = steps[: self._steps_per_epoch]
            steps += steps[:1] * (self._steps_per_epoch - len(steps))
            yield from steps[done : done + self.steps - self._step]

    def _update(self, batches: Sequence[Batch]) -> float:
        training_mode(self._model)
        targets = sum(batch.targets for batch in batches)
        total = 0.0
        for batch in batches:
            loss = batch_loss(self._model, batch, self._device) / targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if not math.isfinite(total):
            raise ValueError(
                f"the loss is {total} at step {self._step + 1}: lower the learning rate"
            )
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return total

    @torch.no_grad()
    def _evaluate(self) -> float:
        self._model.train(False)
        total = sum(batch_loss(self._model, batch, self._device).item() for batch in self._held_out)
        return total / sum(batch.targets for batch in self._held_out)

    def _last_measured(self) -> float:
        return next(p.eval_loss for p in reversed(self._history) if p.eval_loss is not None)

    def _out_of_patience(self) -> bool:
        since = [p for p in self._history if p.eval_loss is not None and p.step > self._best_step]
        return 0 < self._settings.patience <= len(since)

    def save(self, path: Path) -> None:
        """Write the state for :meth:`load`, atomically: an interruption leaves a whole file."""
        cuda = self._device.type == "cuda"
        state = {
            "base": self._base,
            "identity": self._identity,
            "adapter": adapter_tensors(self._layers),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self._device) if cuda else None,
            "step": self._step,
            "tokens": self._tokens,
            "best_step": self._best_step,
            "best_loss": self._best_loss,
            "history": [asdict(point) for point in self._history],
            "told": [asdict(progress) for progress in self._told],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".partial")
        try:
            with scratch.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Restore the state. Raises ValueError if the checkpoint is of another run."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        begun = state["base"]
        if begun["digest"] != self._base["digest"]:
            raise ValueError(
                f"{path} is of a run on another base model, {begun['name']}, than "
                f"{self._base['name']}: resume with the base it was started with"
            )
        if state["identity"] != self._identity:
            raise ValueError(
                f"{path} is of another run: resume with the data and the settings it was "
                "started with"
            )
        restore_adapter(self._layers, state["adapter"])
        self._best = state["best"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"], self._device)
        self._step, self._tokens = state["step"], state["tokens"]
        self._best_step, self._best_loss = state["best_step"], state["best_loss"]
        self._history = [Point(**point) for point in state["history"]]
        self._told = [
            Progress(**{**progress, "point": Point(**progress["point"])})
            for progress in state["told"]
        ]


def warm_cosine(optimizer: torch.optim.Optimizer, warmup: float, steps: int) -> LambdaLR:
    """The learning rate rises along a line for ``warmup`` of the steps, then falls by a cosine."""
    rising = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return LambdaLR(optimizer, factor)


def packs(architecture: Architecture, wanted: bool | None) -> bool:
    """Whether a row holds several examples, which must not see each other.

    wanted: None for the best that can be.

    Raises ValueError if it is wanted of a model that would mix them.
    """
    if not architecture.recurrents:
        return wanted is not False
    if wanted:
        raise ValueError(
            f"packing is not supported for {architecture.family}: layers with a state would carry "
            "one example of a row into the next; leave packing out"
        )
    if wanted is None:
        logger.warning(
            "each example has a row of its own: layers of %s with a state would carry one example "
            "of a row into the next",
            architecture.family,
        )
    return False


def training_mode(model: PreTrainedModel) -> None:
    """Put ``model`` in training mode, but for layers that would compute what serving does not.

    Mamba-2 would take its output layer's weight for a kernel that computes all at once, past an
    adapter on the layer or the rounding of its weight. Routers would choose experts at random.
    """
    model.train()
    architecture = architecture_of(model.config)
    for index, layer in enumerate(architecture.layers):
        names = [each.output.module for each in layer.mixers if isinstance(each, Recurrent)]
        if isinstance(layer.mlp, Mixture):
            router = layer.mlp.router.module
            names += [router, router.rpartition(".")[0]]
        for name in names:
            # Not its parts: adapters in it have dropout.
            model.get_submodule(architecture.module(index, name)).training = False


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing: the backward pass recomputes each block."""
    # Newer transformers renamed it and warn about the older name.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _frozen_bytes(model: nn.Module) -> int:
    """Bytes of the base model, without adapters; tied tensors are counted once."""
    frozen = {id(p): p.nbytes for p in model.parameters() if not p.requires_grad}
    packed = {id(m.packed): m.packed.nbytes for m in model.modules() if isinstance(m, PackedLinear)}
    return sum(frozen.values()) + sum(packed.values())


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hidden_states(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """What the output layer reads, ``(rows, length, hidden)``; examples of a row stay apart."""
    ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
    masks = None
    architecture = architecture_of(model.config)
    if not architecture.recurrents:
        # Not every family of transformers makes its masks from positions (gpt-oss does not).
        embeddings = model.get_parameter(architecture.embedding + ".weight")
        of_this_size = embeddings.new_empty(*ids.shape, 0)
        masks = create_masks_for_generate(model.config, of_this_size, None, None, positions)
    hidden: Tensor = model.base_model(
        ids, attention_mask=masks, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden


def batch_loss(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """Sum of −log p over the batch's labelled tokens; logits exist for those only, in parts."""
    hidden = hidden_states(model, batch, device)
    labels = batch.labels[:, 1:].to(device)
    learned = labels != IGNORED
    predicting, labels = hidden[:, :-1][learned], labels[learned]

    logits_of = OutputLayer.of(model)

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(logits_of(rows), wanted, reduction="sum")
        return loss

    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        total = total + checkpoint(part, predicting[rows], labels[rows], use_reentrant=False)
    return total


def plot_losses(runs: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Training and held-out losses of runs by name, as an image in the format of its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(runs.items()):
        trained = [(p.step, p.train_loss) for p in points if p.train_loss is not None]
        axes.plot(*zip(*trained, strict=True), color=f"C{index}", alpha=0.3)
        measured = [(p.step, p.eval_loss) for p in points if p.eval_loss is not None]
        axes.plot(*zip(*measured, strict=True), color=f"C{index}", marker="o", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (points: held out)")
    axes.legend()
    figure.savefig(path, dpi=150)
