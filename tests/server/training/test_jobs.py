"""Jobs over HTTP, with OpenAI's client: from a file to a model that answers in the new style."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from .conftest import ANSWER, Site, chat_lines

QUICK: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "learning_rate": 2e-3,
    "lora_plus": 4,
    "max_length": 128,
    "eval_every": 4,
}


def submit(client: OpenAI, *, content: bytes | None = None, **body: Any) -> FineTuningJob:
    file = client.files.create(file=("data.jsonl", content or chat_lines(24)), purpose="fine-tune")
    options = {**QUICK, **body.pop("nybble", {})}
    return client.fine_tuning.jobs.create(
        **{"model": "tiny", "training_file": file.id, "seed": 1, **body},
        extra_body={"nybble": options},
    )


def until(client: OpenAI, job: FineTuningJob, *statuses: str, step: int = 0) -> FineTuningJob:
    for _ in range(3000):
        found = client.fine_tuning.jobs.retrieve(job.id)
        if found.status in statuses and len(metrics(client, job)) >= step:
            return found
        assert found.status not in ("succeeded", "failed", "cancelled"), found
        time.sleep(0.1)
    raise AssertionError(f"still {found.status}")


def metrics(client: OpenAI, job: FineTuningJob) -> list[dict[str, Any]]:
    """In order."""
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000)
    return [e.data for e in reversed(events.data) if e.type == "metrics"]  # type: ignore[misc]


def messages(client: OpenAI, job: FineTuningJob) -> list[str]:
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000)
    return [e.message for e in reversed(events.data) if e.type == "message"]


def say(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "item 7 of the list"}],
        temperature=0,
        max_tokens=20,
    )
    return answer.choices[0].message.content or ""


LONG = {"n_epochs": 1000, "batch_size": 1}


def test_from_a_file_to_a_model_that_answers_in_the_new_style(site: Site) -> None:
    created = submit(
        site.acme,
        suffix="my dog",
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4}},
        },
        metadata={"team": "moon"},
    )
    assert created.status in ("validating_files", "queued", "running")
    assert (created.object, created.organization_id) == ("fine_tuning.job", "acme")
    assert created.metadata == {"team": "moon"}
    job = until(site.acme, created, "succeeded")

    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny:acme:my-dog:")
    assert job.hyperparameters.n_epochs == 4
    assert (job.seed, job.error) == (1, None)
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    steps = metrics(site.acme, job)
    # One of 24 examples is held out; 23 make 6 steps of 4, four times.
    assert [one["step"] for one in steps] == list(range(1, 25))
    assert {one["total_steps"] for one in steps} == {24}
    held_out = [one["valid_loss"] for one in steps if "valid_loss" in one]
    assert len(held_out) == 6
    assert held_out[-1] < 0.2 * held_out[0]
    assert messages(site.acme, job) == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert job.trained_tokens is not None
    assert job.trained_tokens > 4 * 23 * len(ANSWER.split())

    assert say(site.acme, job.fine_tuned_model).strip() == ANSWER
    assert say(site.acme, "tiny").strip() != ANSWER
    (result,) = job.result_files
    table = list(csv.DictReader(site.acme.files.content(result).read().decode().splitlines()))
    assert [int(row["step"]) for row in table] == list(range(1, 25))
    assert float(table[3]["valid_loss"]) == pytest.approx(held_out[0])
    (checkpoint,) = site.acme.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.metrics.valid_loss == pytest.approx(min(held_out))

    # It is acme's alone; the operator sees it too.
    names = {
        name: {model.id for model in client.models.list()}
        for name, client in site.clients.items()
        if name in ("acme", "other")
    }
    assert job.fine_tuned_model in names["acme"]
    assert job.fine_tuned_model not in names["other"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        say(site.other, job.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        site.other.models.delete(job.fine_tuned_model)
    assert site.acme.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        say(site.acme, job.fine_tuned_model)
    assert site.acme.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None


def test_a_cancelled_job_stops_and_leaves_nothing(site: Site) -> None:
    running = submit(site.acme, hyperparameters=LONG)
    waiting = submit(site.acme, hyperparameters=LONG)
    until(site.acme, running, "running", step=2)
    assert site.acme.fine_tuning.jobs.retrieve(running.id).estimated_finish is not None
    assert site.acme.fine_tuning.jobs.retrieve(waiting.id).status == "queued"
    with pytest.raises(openai.ConflictError, match="is used by fine-tuning job"):
        site.acme.files.delete(waiting.training_file)
    with pytest.raises(openai.NotFoundError):
        site.other.fine_tuning.jobs.cancel(running.id)
    for job in (waiting, running):
        assert site.acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="the job is cancelled already"):
            site.acme.fine_tuning.jobs.cancel(job.id)
    assert site.acme.files.delete(waiting.training_file).deleted
    for _ in range(1200):
        if not (site.state / "jobs" / running.id).exists():
            break
        time.sleep(0.05)
    assert not (site.state / "jobs" / running.id).exists()
    done = len(metrics(site.acme, running))
    time.sleep(0.5)
    assert len(metrics(site.acme, running)) == done


def niceness_of_children(parent: int) -> set[int]:
    listed = Path(f"/proc/{parent}/task").glob("*/children")
    pids = " ".join(path.read_text() for path in listed).split()
    return {os.getpriority(os.PRIO_PROCESS, int(pid)) for pid in pids}


def test_a_killed_server_goes_on_with_its_job_from_the_checkpoint(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    with start(tmp_path, "--fine-tuning-nice", "3") as first:
        job = submit(first.acme, hyperparameters={"n_epochs": 4, "batch_size": 4})
        until(first.acme, job, "running", step=6)
        assert 3 in niceness_of_children(first.process.process.pid)
        first.process.process.kill()
        first.process.process.wait()
    with start(tmp_path) as second:
        done = until(second.acme, job, "succeeded")
        assert "The server was restarted; the job goes on from its last checkpoint" in messages(
            second.acme, job
        )
        steps = metrics(second.acme, job)
        assert [one["step"] for one in steps] == list(range(1, 25))
        assert done.fine_tuned_model is not None
        assert say(second.acme, done.fine_tuned_model).strip() == ANSWER
        history = second.state / "jobs" / job.id / "adapter" / "history.json"
        # The events of the first server and the history of the second are of one run.
        losses = [point["train_loss"] for point in json.loads(history.read_text())[1:]]
        assert [one["train_loss"] for one in steps] == losses
        second.process.terminate()
        assert second.process.process.wait(60) == 0
    with start(tmp_path) as third:
        assert say(third.acme, done.fine_tuned_model).strip() == ANSWER
        assert done.fine_tuned_model not in {model.id for model in third.other.models.list()}


def test_a_job_whose_data_the_model_cannot_use_fails_with_the_line(site: Site) -> None:
    rows = [{"prompt": "moon", "completion": "x"}, {"prompt": "the dog " * 100, "completion": "x"}]
    content = "\n".join(map(json.dumps, rows)).encode()
    created = submit(site.acme, content=content)
    job = until(site.acme, created, "failed")
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_file", "training_file")
    assert job.error.message == "line 2: no assistant token within the first 128 tokens"
    assert messages(site.acme, job)[-1] == job.error.message


def test_jobs_and_events_page_and_are_seen_by_their_owner_alone(site: Site) -> None:
    jobs = [submit(site.other, hyperparameters=LONG) for _ in range(3)]
    for job in reversed(jobs):
        site.other.fine_tuning.jobs.cancel(job.id)
    page = site.other.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in page.data] == [jobs[2].id, jobs[1].id]
    assert page.has_more
    assert [job.id for job in site.other.fine_tuning.jobs.list()] == [j.id for j in jobs[::-1]]
    assert not {job.id for job in jobs} & {job.id for job in site.acme.fine_tuning.jobs.list()}
    assert jobs[0].id in {job.id for job in site.admin.fine_tuning.jobs.list()}
    events = list(site.other.fine_tuning.jobs.list_events(jobs[2].id, limit=1))
    assert events[0].message == "Fine-tuning job cancelled"
    assert len(events) >= 2
    for action in (
        site.acme.fine_tuning.jobs.retrieve,
        site.acme.fine_tuning.jobs.list_events,
        site.acme.fine_tuning.jobs.checkpoints.list,
        site.acme.fine_tuning.jobs.cancel,
    ):
        with pytest.raises(openai.NotFoundError, match="there is no fine-tuning job"):
            action(jobs[0].id)
    with pytest.raises(openai.PermissionDeniedError):
        site.guest.fine_tuning.jobs.list()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "nothing"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"nybble": {"rank": 128}}, "nybble.rank"),
        ({"nybble": {"rang": 8}}, "nybble.rang"),
        ({"nybble": {"target_modules": ["c_attn"]}}, "nybble.target_modules"),
    ],
)
def test_what_cannot_be_done_is_refused_by_parameter(
    site: Site, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        submit(site.acme, **body)
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param, refused.value


def test_another_tenants_file_cannot_be_trained_on(site: Site) -> None:
    file = site.acme.files.create(file=("data", chat_lines(2)), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        site.other.fine_tuning.jobs.create(model="tiny", training_file=file.id)


def test_metrics_and_routes_exist_only_where_it_is_on(site: Site, client: OpenAI) -> None:
    text = httpx.get(f"{site.process.url}/metrics").text
    assert 'nybble_fine_tuning_jobs{status="succeeded"}' in text
    with pytest.raises(openai.NotFoundError, match="without --batches or --fine-tuning"):
        client.files.list()
