"""Cancelling by id, usage for billing, and SageMaker's paths."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import Engine
from nybble.server.observability.logs import LogEvent
from nybble.server.tenancy.tenants import Tenants
from nybble.server.tenancy.usage import UsageLedger

from ..client import CHAT, COMPLETIONS, HELLO, Client, refused, run
from ..conftest import started_engine

LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": HELLO,
    "max_tokens": 2000,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> Iterator[Engine]:
    with started_engine(tiny_model(max_length=4096)) as engine:
        yield engine


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    """Ann and Bob, whose keys are their names."""
    file = tmp_path / "tenants.toml"
    keys = {name: sha256(name.encode()).hexdigest() for name in ("ann", "bob")}
    file.write_text(
        "".join(f'[tenants.{name}]\nkeys = ["sha256:{key}"]\n' for name, key in keys.items())
    )
    return Tenants(file)


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def abort(client: Client, id: str, headers: Any = None) -> tuple[int, Any]:
    async with client.post("/abort_request", json={"rid": id}, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(("method", "after"), [("post", "/cancel"), ("delete", "")])
def test_an_id_may_be_in_the_path(engine: Engine, method: str, after: str) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(CHAT, json={**LONG, "stream": True}) as response:
            id = json.loads((await response.content.readline())[6:])["id"]
            async with getattr(client, method)(f"/v1/requests/{id}{after}") as answer:
                assert await answer.json() == {"cancelled": 1}
            text = await response.text()
        assert json.loads(text.strip().split("data: ")[-1])["error"]["code"] == "cancelled"
        async with getattr(client, method)(f"/v1/requests/{id}{after}") as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (404, "request_not_found")

    run(engine, scenario)


@pytest.mark.parametrize("named", [True, False])
def test_a_stream_is_cancelled_by_id(engine: Engine, named: bool) -> None:
    async def scenario(client: Client) -> None:
        headers = {"X-Request-Id": "mine"} if named else {}
        body = {**LONG, "stream": True}
        async with client.post(CHAT, json=body, headers=headers) as response:
            first = json.loads((await response.content.readline())[6:])
            id = "mine" if named else first["id"]
            assert await abort(client, id) == (200, {"cancelled": 1})
            text = await response.text()
        assert json.loads(text.strip().split("data: ")[-1])["error"]["code"] == "cancelled"
        assert await abort(client, id) != (200, {"cancelled": 1})

    run(engine, scenario)


def test_an_answer_that_is_awaited_whole_is_cancelled_by_id(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(client: Client) -> None:
        asked = asyncio.create_task(client.post(CHAT, json=LONG, headers={"X-Request-Id": "mine"}))
        for _ in range(500):
            if (await abort(client, "mine"))[0] == 200:
                break
            await asyncio.sleep(0.01)
        async with await asked as response:
            assert response.status == 499
            assert (await response.json())["error"]["code"] == "cancelled"

    run(engine, scenario)
    told = [each.msg.fields for each in caplog.records if isinstance(each.msg, LogEvent)]
    assert "cancelled" in [fields.get("error") for fields in told if fields.get("status") == 499]


def test_only_its_own_tenant_cancels_a_request(engine: Engine, tenants: Tenants) -> None:
    async def scenario(client: Client) -> None:
        headers = key("ann") | {"X-Request-Id": "mine"}
        async with client.post(CHAT, json={**LONG, "stream": True}, headers=headers) as response:
            await response.content.readline()
            status, error = await abort(client, "mine", key("bob"))
            assert (status, error["error"]["code"]) == (404, "request_not_found")
            assert (await abort(client, "mine", key("ann")))[0] == 200

    run(engine, scenario, tenants=tenants)


def test_usage_is_counted_by_tenant_and_adapter(engine: Engine, tenants: Tenants) -> None:
    async def usage(client: Client, name: str) -> list[dict[str, Any]]:
        async with client.get("/v1/usage", headers=key(name)) as response:
            assert response.status == 200
            return list((await response.json())["data"])

    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "ignore_eos": True}
        read = 0
        for _ in range(2):
            async with client.post(CHAT, json=body, headers=key("ann")) as response:
                read += (await response.json())["usage"]["prompt_tokens"]
        prompt = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "n": 2, "ignore_eos": True}
        async with client.post(COMPLETIONS, json=prompt, headers=key("bob")) as response:
            of_bob = (await response.json())["usage"]
        async with client.post(CHAT, json={**body, "max_tokens": -5}, headers=key("bob")) as wrong:
            assert wrong.status == 400
        (ann,) = await usage(client, "ann")
        cached = ann.pop("cached_tokens")
        assert 0 <= cached <= read
        assert ann == {
            "tenant": "ann",
            "adapter": None,
            "requests": 2,
            "prompt_tokens": read,
            "completion_tokens": 6,
        }
        both = await usage(client, "operator")
        assert [row["tenant"] for row in both] == ["ann", "bob"]
        assert both[1]["completion_tokens"] == of_bob["completion_tokens"] == 8
        assert both[1]["prompt_tokens"] == of_bob["prompt_tokens"]
        assert await usage(client, "general") == []  # of requests without a tenant
        async with client.get("/v1/usage") as response:
            assert response.status == 401

    run(engine, scenario, tenants=tenants, admin_keys=("operator",), api_keys=("general",))


def test_names_that_come_and_go_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.server.tenancy.usage._MOST", 3)
    ledger = UsageLedger()
    for number in range(10):
        ledger.add("", f"adapter-{number}", prompt=1, cached=0, completion=2)
    rows = ledger.rows(None)
    assert len(rows) == 4
    assert sum(row["completion_tokens"] for row in rows) == 20


def test_sagemakers_paths(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for method in (client.get, client.post):
            async with method("/ping") as response:
                assert response.status == 200
        chat = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
        for body, kind in (
            (chat, "chat.completion"),
            ({"model": "tiny", "prompt": "hello", "max_tokens": 2}, "text_completion"),
            ({"model": "tiny", "input": "hello"}, "list"),
        ):
            async with client.post("/invocations", json=body) as response:
                assert (await response.json())["object"] == kind
        async with client.post("/invocations", json={**chat, "stream": True}) as response:
            assert (await response.text()).endswith("data: [DONE]\n\n")
        assert "messages" in (await refused(client, "/invocations", {"x": 1}))["message"]

    run(engine, scenario)


def test_a_model_is_asked_for_by_name(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/v1/models/tiny") as response:
            assert (await response.json())["id"] == "tiny"
        async with client.get("/v1/models/other") as response:
            assert response.status == 404

    run(engine, scenario)
