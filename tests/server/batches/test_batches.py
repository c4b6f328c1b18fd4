"""Batches through OpenAI's client, against the application in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from nybble.engine import Engine
from nybble.server.batches import batches as batches_module
from nybble.server.batches import runner as runner_module
from nybble.server.files.storage import StorageSettings
from nybble.server.tenancy.tenants import Tenants, new_key

from ..client import CHAT, COMPLETIONS, Client, run

CLIENTS: list[AsyncOpenAI] = []  # to be closed at the end of a scenario
ENDED = ("completed", "failed", "expired", "cancelled")


def completion(id: str, prompt: str = "the cat", **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    return {"custom_id": id, "method": "POST", "url": COMPLETIONS, "body": body}


def jsonl(lines: list[Any]) -> bytes:
    return b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)


def of(client: Client, key: str = "none") -> AsyncOpenAI:
    api = AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key=key, max_retries=0)
    CLIENTS.append(api)
    return api


async def created(
    api: AsyncOpenAI, lines: list[Any], endpoint: Any = COMPLETIONS, **fields: Any
) -> Any:
    file = await api.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return await api.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields
    )


async def ended(api: AsyncOpenAI, batch: Any) -> Any:
    while batch.status not in ENDED:
        await asyncio.sleep(0.01)
        batch = await api.batches.retrieve(batch.id)
    return batch


async def results(api: AsyncOpenAI, file: str | None) -> dict[str, dict[str, Any]]:
    assert file is not None
    lines = (await api.files.content(file)).text.splitlines()
    found = {line["custom_id"]: line for line in map(json.loads, lines)}
    assert len(found) == len(lines)  # no request has two results
    return found


@pytest.fixture
def serve(engine: Engine, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario against a server with batches; again with the same files."""

    def begin(scenario: Callable[[Client], Awaitable[None]], **options: Any) -> None:
        quota = options.pop("quota", 1 << 20)
        storage = StorageSettings(state=tmp_path / "state", quota_bytes=quota)

        async def closing(client: Client) -> None:
            try:
                await scenario(client)
            finally:
                while CLIENTS:
                    await CLIENTS.pop().close()

        run(engine, closing, storage=storage, batches=True, **options)

    return begin


@asynccontextmanager
async def held_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[None]:
    """Meanwhile no line of a batch gets beyond the engine's door."""
    generate, opened = engine.generate, asyncio.Event()

    async def late(request: Any) -> AsyncGenerator[Any]:
        if request.tenant.endswith("(batches)"):
            await opened.wait()
        async for output in generate(request):
            yield output

    monkeypatch.setattr(engine, "generate", late)
    yield
    opened.set()


def test_a_batch_has_the_results_that_its_requests_have_alone(serve: Callable[..., None]) -> None:
    lines = {
        COMPLETIONS: [completion(f"r{i}", f"the number {i}", n=1 + i % 3) for i in range(20)],
        CHAT: [
            {
                "custom_id": "chat",
                "method": "POST",
                "url": CHAT,
                "body": {
                    "messages": [{"role": "user", "content": "hello"}],
                    "max_tokens": 4,
                    "temperature": 0,
                },
            }
        ],
        "/v1/embeddings": [
            {
                "custom_id": "vectors",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": "tiny", "input": ["a", "b", "c"]},
            }
        ],
        "/v1/responses": [
            {
                "custom_id": "response",
                "method": "POST",
                "url": "/v1/responses",
                "body": {"model": "tiny", "input": "hi", "max_output_tokens": 4, "temperature": 0},
            }
        ],
    }

    async def scenario(client: Client) -> None:
        api = of(client)
        for endpoint, requests in lines.items():
            batch = await created(api, requests, endpoint, metadata={"of": "a test"})
            assert (batch.status, batch.metadata) == ("validating", {"of": "a test"})
            assert batch.expires_at - batch.created_at == 24 * 3600
            batch = await ended(api, batch)
            assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
            total = len(requests)
            counts = batch.request_counts
            assert (counts.total, counts.completed, counts.failed) == (total, total, 0)
            assert batch.created_at <= batch.in_progress_at <= batch.completed_at
            found = await results(api, batch.output_file_id)
            for request in requests:
                result = found[request["custom_id"]]
                assert (result["error"], result["response"]["status_code"]) == (None, 200)
                async with client.post(endpoint, json=request["body"]) as response:
                    alone = await response.json()
                for each in (alone, result["response"]["body"]):
                    for name in ("id", "created", "created_at", "completed_at"):
                        each.pop(name, None)
                    for item in each.get("output", []):
                        item.pop("id")
                    for details in ("prompt_tokens_details", "input_tokens_details"):
                        each["usage"].pop(details, None)
                found_body = result["response"]["body"]
                if endpoint == "/v1/embeddings":  # float32 rounds as rows are computed together
                    for mine, theirs in zip(found_body.pop("data"), alone.pop("data"), strict=True):
                        assert mine["embedding"] == pytest.approx(theirs["embedding"], abs=1e-5)
                assert found_body == alone
        output = await api.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        listed = await api.batches.list(limit=2)
        assert listed.data[0] == batch
        assert listed.has_more

    serve(scenario)


def test_a_line_that_cannot_be_answered_is_in_the_file_of_errors(
    serve: Callable[..., None],
) -> None:
    lines = [
        completion("good"),
        completion("unknown field", colour="red"),
        completion("too long", max_tokens=10**9),
        completion("streamed", stream=True),
        completion("too many", n=100),
    ]

    async def scenario(client: Client) -> None:
        api = of(client)
        batch = await ended(api, await created(api, lines))
        counts = batch.request_counts
        assert (batch.status, counts.completed, counts.failed) == ("completed", 1, 4)
        assert [*await results(api, batch.output_file_id)] == ["good"]
        errors = await results(api, batch.error_file_id)
        responses = {id: line["response"] for id, line in errors.items()}
        assert {each["status_code"] for each in responses.values()} == {400}
        params = {id: each["body"]["error"]["param"] for id, each in responses.items()}
        assert params == {
            "unknown field": "colour",
            "too long": "max_tokens",
            "streamed": "stream",
            "too many": "n",
        }

    serve(scenario)


WRONG: list[tuple[list[Any], str, int | None]] = [
    ([], "empty_file", None),
    ([completion("a"), b"{", completion("b")], "invalid_json_line", 2),
    ([b"[1]"], "invalid_json_line", 1),
    ([completion("a"), b"", completion("a")], "duplicate_custom_id", 3),
    ([{**completion("a"), "custom_id": 5}], "missing_required_parameter", 1),
    ([{**completion("a"), "method": "GET"}], "invalid_method", 1),
    ([{**completion("a"), "url": "/v1/models"}], "invalid_url", 1),
    ([{**completion("a"), "url": CHAT}], "mismatched_url", 1),
    ([{**completion("a"), "body": "x"}], "missing_required_parameter", 1),
    ([completion("a"), completion("b", model="other")], "mismatched_model", 2),
    ([completion("a", model="other")], "model_not_found", None),
]


def test_a_wrong_line_fails_the_batch_before_any_is_answered(serve: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        api = of(client)
        for lines, code, line in WRONG:
            batch = await ended(api, await created(api, lines))
            assert batch.status == "failed", code
            assert batch.failed_at
            assert batch.output_file_id is None
            assert [(each.code, each.line) for each in batch.errors.data] == [(code, line)]

    serve(scenario)


def test_what_creates_no_batch(serve: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        api = of(client)
        file = await api.files.create(file=("x", jsonl([completion("a")])), purpose="batch")
        good: dict[str, Any] = {
            "input_file_id": file.id,
            "endpoint": COMPLETIONS,
            "completion_window": "24h",
        }
        for name, wrong, kind in (
            ("input_file_id", "file-x", openai.NotFoundError),
            ("endpoint", "/v1/models", openai.BadRequestError),
            ("completion_window", "1h", openai.BadRequestError),
        ):
            with pytest.raises(kind) as refused:
                await api.batches.create(**{**good, name: wrong})
            assert refused.value.body["param"] == name  # type: ignore[index]
        with pytest.raises(openai.BadRequestError, match="expected 'batch'"):
            await api.files.create(file=("x", b"{}"), purpose="fine-tune")
        batch = await ended(api, await api.batches.create(**good))
        with pytest.raises(openai.ConflictError, match="completed already"):
            await api.batches.cancel(batch.id)
        with pytest.raises(openai.BadRequestError, match="expected 'batch'"):
            await api.batches.create(**{**good, "input_file_id": batch.output_file_id})
        with pytest.raises(openai.NotFoundError):
            await api.batches.retrieve("batch_x")

    serve(scenario)


def test_a_cancelled_batch_keeps_what_it_has(
    engine: Engine, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: Client) -> None:
        api = of(client)
        async with held_back(engine, monkeypatch):
            batch = await created(api, [completion(f"r{i}") for i in range(30)])
            while (await api.batches.retrieve(batch.id)).status != "in_progress":
                await asyncio.sleep(0.01)
            with pytest.raises(openai.ConflictError, match="cancel it first"):
                await api.files.delete(batch.input_file_id)
            assert (await api.batches.cancel(batch.id)).status == "cancelling"
            batch = await ended(api, batch)
        assert (batch.status, batch.request_counts.completed) == ("cancelled", 0)
        assert batch.cancelling_at
        assert batch.cancelled_at
        await api.files.delete(batch.input_file_id)

    serve(scenario)


def test_lines_that_are_not_answered_within_the_window_expire(
    engine: Engine, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "WINDOW_SECONDS", 1)

    async def scenario(client: Client) -> None:
        api = of(client)
        async with held_back(engine, monkeypatch):
            batch = await ended(api, await created(api, [completion("a"), completion("b")]))
        assert batch.status == "expired"
        assert batch.expired_at
        assert batch.finalizing_at
        errors = await results(api, batch.error_file_id)
        assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}
        assert {line["response"] for line in errors.values()} == {None}
        assert batch.request_counts.failed == 2

    serve(scenario)


def test_a_restarted_server_answers_only_what_is_left(
    engine: Engine, serve: Callable[..., None], tmp_path: Path
) -> None:
    lines = [completion(f"r{i}", f"number {i}", max_tokens=16) for i in range(40)]
    before: dict[str, Any] = {}

    async def first(client: Client) -> None:
        api = of(client)
        batch = await created(api, lines)
        while not (before and before["done"]):
            await asyncio.sleep(0)
            batch = await api.batches.retrieve(batch.id)
            before.update(id=batch.id, done=batch.request_counts.completed)
        assert before["done"] < len(lines)

    async def second(client: Client) -> None:
        api = of(client)
        batch = await ended(api, await api.batches.retrieve(before["id"]))
        assert (batch.status, batch.request_counts.completed) == ("completed", len(lines))
        assert len(await results(api, batch.output_file_id)) == len(lines)
        assert not [*(tmp_path / "state" / "batches").iterdir()]

    serve(first)
    # As if it had been killed while it wrote a line.
    output = tmp_path / "state" / "batches" / before["id"] / "output.jsonl"
    found = output.read_bytes()
    done = found.count(b"\n")
    output.write_bytes(found + b'{"id":"batch_req_1","cust')
    answered: list[str] = []
    generate = engine.generate

    def counted(request: Any) -> Any:
        answered.append(request.request_id)
        return generate(request)

    engine.generate = counted  # type: ignore[method-assign]
    serve(second)
    assert len(answered) == len(lines) - done


def test_a_line_that_ends_servers_does_not_do_so_for_ever(
    engine: Engine, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_MAX_STUCK", 2)
    ids: list[str] = []

    async def never(request: Any) -> AsyncGenerator[Any]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(engine, "generate", never)

    async def begin(client: Client) -> None:
        ids.append((await created(of(client), [completion("a")])).id)
        await asyncio.sleep(0.1)

    async def again(client: Client) -> None:
        await asyncio.sleep(0.1)

    async def last(client: Client) -> None:
        batch = await ended(of(client), await of(client).batches.retrieve(ids[0]))
        assert batch.status == "failed"
        assert "without finishing" in batch.errors.data[0].message

    for scenario in (begin, again, again, last):
        serve(scenario)


def test_files_that_are_full_take_no_results(serve: Callable[..., None]) -> None:
    lines = [completion(f"r{i}") for i in range(10)]

    async def scenario(client: Client) -> None:
        api = of(client)
        batch = await ended(api, await created(api, lines))
        counts = batch.request_counts
        assert batch.status == "completed"
        assert counts.completed
        assert counts.failed
        assert counts.completed + counts.failed == 10
        errors = await results(api, batch.error_file_id)
        assert {line["error"]["code"] for line in errors.values()} == {"storage_limit_exceeded"}

    serve(scenario, quota=len(jsonl(lines)) + 1200)


def test_a_tenant_sees_its_own_and_keeps_its_limits(
    serve: Callable[..., None], tmp_path: Path
) -> None:
    keys, file = {}, tmp_path / "tenants.toml"
    limits = {"acme": "requests_per_minute = 2", "other": "max_concurrency = 1"}
    text = ""
    for name, limit in limits.items():
        keys[name], stored = new_key()
        text += f'[tenants.{name}]\nkeys = ["{stored}"]\n{limit}\n'
    file.write_text(text)

    async def scenario(client: Client) -> None:
        acme, other, admin = (of(client, key) for key in (keys["acme"], keys["other"], "boss"))
        api = of(client, "plain")
        mine = await created(acme, [completion(f"r{i}") for i in range(2)])
        theirs = await ended(other, await created(other, [completion(f"r{i}") for i in range(6)]))
        assert theirs.status == "completed"
        for each in (other, api):
            with pytest.raises(openai.NotFoundError):
                await each.batches.retrieve(mine.id)
            with pytest.raises(openai.NotFoundError):
                await each.batches.cancel(mine.id)
        assert {batch.id for batch in (await admin.batches.list()).data} == {mine.id, theirs.id}
        assert not (await api.batches.list()).data
        # Half of acme's requests of a minute are kept for those that do not wait: the other line
        # has its turn in half a minute.
        done = (await acme.batches.retrieve(mine.id)).request_counts.completed
        assert done <= 1
        answer = await acme.completions.create(model="tiny", prompt="now", max_tokens=1)
        assert answer.choices
        await admin.batches.cancel(mine.id)
        await ended(acme, mine)

    serve(scenario, tenants=Tenants(file), admin_keys=("boss",), api_keys=("plain",))


def test_lines_that_have_not_begun_are_subject_to_the_tenants_file_of_now(
    engine: Engine, serve: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, stored = new_key()
    acme = f'[tenants.acme]\nkeys = ["{stored}"]\n'
    others = f'[tenants.other]\nkeys = ["{new_key()[1]}"]\n'
    changes = {acme + "models = []": (404, "model_not_found"), others: (401, "invalid_api_key")}
    file = tmp_path / "tenants.toml"
    file.write_text(acme)
    tenants = Tenants(file)
    generate, begun, opened = engine.generate, asyncio.Event(), asyncio.Event()

    async def late(request: Any) -> AsyncGenerator[Any]:
        begun.set()
        await opened.wait()
        async for output in generate(request):
            yield output

    monkeypatch.setattr(engine, "generate", late)

    async def scenario(client: Client) -> None:
        admin = of(client, "boss")
        for text, refused in changes.items():
            begun.clear()
            opened.clear()
            file.write_text(acme)
            tenants.reload()
            batch = await created(of(client, key), [completion(f"r{i}") for i in range(30)])
            await begun.wait()
            file.write_text(text)
            tenants.reload()
            opened.set()
            batch = await ended(admin, batch)
            assert batch.status == "completed"
            assert batch.request_counts.failed >= 30 - engine.max_num_seqs
            errors = await results(admin, batch.error_file_id)
            answers = [line["response"] for line in errors.values()]
            found = {(a["status_code"], a["body"]["error"]["code"]) for a in answers}
            assert found == {refused}

    serve(scenario, tenants=tenants, admin_keys=("boss",))


def test_other_requests_go_first(engine: Engine, serve: Callable[..., None]) -> None:
    """A batch that could fill every seat gives them back, and takes no place in the queue."""

    async def scenario(client: Client) -> None:
        api = of(client)
        long = [completion(f"r{i}", max_tokens=200, ignore_eos=True) for i in range(30)]
        batch = await created(api, long)
        while engine.stats().running < engine.max_num_seqs:
            await asyncio.sleep(0.005)
        answers = await asyncio.gather(
            *(
                api.completions.create(model="tiny", prompt=f"now {i}", max_tokens=2)
                for i in range(8)
            )
        )
        assert len(answers) == 8
        counts = (await api.batches.retrieve(batch.id)).request_counts
        assert counts.completed < len(long) - engine.max_num_seqs
        await api.batches.cancel(batch.id)
        await ended(api, batch)

    serve(scenario)
