"""A job's plan: the hyperparameters that the server chooses, and the trainer's settings."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass
from typing import Any

from nybble.finetune import FinetuneSettings, LoRASettings
from nybble.server.training.schema import CreateJob

_EPOCHS, _MAX_EPOCHS = 3, 25
_FEW_EXAMPLES, _MANY_EXAMPLES = 100, 25_000  # to be seen in all epochs together
_MIN_STEPS = 60
_MAX_BATCH = 16
_EVALUATIONS = 10
_PASS_TOKENS = 4096  # in one forward pass at most, as long as that is one example


@dataclass(frozen=True)
class Plan:
    """A run over ``examples`` lines; some are held out if there is no validation file."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    seed: int
    settings: FinetuneSettings

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }

    def stored(self) -> dict[str, Any]:
        return {
            "hyperparameters": self.hyperparameters(),
            "seed": self.seed,
            "settings": asdict(self.settings),
        }


def plan_of(body: CreateJob, examples: int) -> Plan:
    """The plan for a request. Raises ValueError if the options contradict each other."""
    chosen, options = body.chosen, body.nybble
    epochs = chosen.n_epochs
    if epochs is None or epochs == "auto":
        epochs = _auto_epochs(examples)
    batch = chosen.batch_size
    if batch is None or batch == "auto":
        # The largest batch that leaves enough steps to learn.
        batch = max(1, min(_MAX_BATCH, examples * epochs // _MIN_STEPS))
    multiplier = chosen.learning_rate_multiplier
    if multiplier is None or multiplier == "auto":
        multiplier = 1.0
    # Every pass reads all of the base's weights, so a few large passes are faster.
    room = max(1, _PASS_TOKENS // options.max_length)
    rows = max(rows for rows in range(1, min(batch, room) + 1) if batch % rows == 0)
    seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
    steps = options.max_steps or epochs * math.ceil(examples / batch)
    settings = FinetuneSettings(
        lora=LoRASettings(
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            use_rslora=options.rslora,
            target_modules=tuple(options.target_modules) if options.target_modules else None,
        ),
        learning_rate=options.learning_rate * multiplier,
        lora_plus=options.lora_plus,
        epochs=epochs,
        max_steps=options.max_steps,
        batch_size=rows,
        accumulation=batch // rows,
        max_length=options.max_length,
        packing=options.packing,
        eval_every=options.eval_every or math.ceil(steps / _EVALUATIONS),
        patience=options.patience,
        seed=seed,
    )
    return Plan(epochs, batch, multiplier, seed, settings)


def settings_of(stored: dict[str, Any]) -> FinetuneSettings:
    """The trainer's settings from what :meth:`Plan.stored` gave."""
    lora = dict(stored["lora"])
    if lora["target_modules"] is not None:
        lora["target_modules"] = tuple(lora["target_modules"])
    return FinetuneSettings(**{**stored, "lora": LoRASettings(**lora)})


def _auto_epochs(examples: int) -> int:
    """OpenAI's rule, as its cookbook has it ("Data preparation and analysis for chat model
    fine-tuning"): three, more for few examples and fewer for many."""
    if examples * _EPOCHS < _FEW_EXAMPLES:
        return min(_MAX_EPOCHS, _FEW_EXAMPLES // examples)
    if examples * _EPOCHS > _MANY_EXAMPLES:
        return max(1, _MANY_EXAMPLES // examples)
    return _EPOCHS
