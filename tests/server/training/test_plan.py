"""What the server chooses where a job's hyperparameters are left to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nybble.server.training.plan import plan_of, settings_of
from nybble.server.training.schema import CreateJob


def body(**values: Any) -> CreateJob:
    return CreateJob.model_validate({"model": "m", "training_file": "f", **values})


@pytest.mark.parametrize(
    ("examples", "epochs", "batch"),
    [(10, 10, 1), (60, 3, 3), (500, 3, 16), (20_000, 1, 16), (1, 25, 1)],
)
def test_few_examples_are_seen_more_often_and_many_in_larger_batches(
    examples: int, epochs: int, batch: int
) -> None:
    for chosen in ({}, {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}}):
        plan = plan_of(body(**chosen), examples)
        assert (plan.n_epochs, plan.batch_size, plan.learning_rate_multiplier) == (epochs, batch, 1)


def test_what_is_given_is_taken_wherever_it_stands() -> None:
    given = {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": given}}
    for request in (body(hyperparameters=given), body(method=method)):
        plan = plan_of(request, 100)
        assert plan.hyperparameters() == given
        assert plan.settings.learning_rate == pytest.approx(2.5e-5)
        assert plan.settings.epochs == 2


@pytest.mark.parametrize(
    ("batch", "max_length", "passes"),
    [(6, 1024, (3, 2)), (8, 512, (8, 1)), (7, 1024, (1, 7)), (4, 8192, (1, 4))],
)
def test_a_batch_is_split_into_passes_that_fit(
    batch: int, max_length: int, passes: tuple[int, int]
) -> None:
    request = body(hyperparameters={"batch_size": batch}, nybble={"max_length": max_length})
    settings = plan_of(request, 100).settings
    assert (settings.batch_size, settings.accumulation) == passes


def test_the_trainers_settings_survive_being_stored() -> None:
    options = {"rank": 4, "rslora": True, "target_modules": ["q_proj"], "lora_plus": 1.0}
    plan = plan_of(body(nybble=options, seed=7), 100)
    stored = json.loads(json.dumps(plan.stored()))
    assert settings_of(stored["settings"]) == plan.settings
    assert stored["seed"] == plan.settings.seed == 7
