"""/v1/responses with a store: conversations by id, responses in the background, and their ends."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nybble.engine import Engine
from nybble.server.api.event_log import EventLogs
from nybble.server.api.response_store import ResponseStore, StoredResponse
from nybble.server.http.errors import as_api_error
from nybble.server.tenancy.tenants import Tenants

from ..client import RESPONSES, Client, refused, run
from ..conftest import started_engine

BODY: dict[str, Any] = {
    "model": "tiny",
    "input": "the quick fox",
    "max_output_tokens": 6,
    "seed": 1,
}


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> Iterator[Engine]:
    with started_engine(tiny_model(max_length=2048)) as engine:
        yield engine


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, int]:
    return tmp_path / "responses.db", 1 << 20


async def respond(client: Client, headers: Any = None, **options: Any) -> dict[str, Any]:
    async with client.post(RESPONSES, json={**BODY, **options}, headers=headers) as response:
        assert response.status == 200, await response.text()
        if options.get("stream"):
            text = await response.text()
            return dict(json.loads(text.strip().split("data: ")[-1])["response"])
        return dict(await response.json())


async def get(client: Client, id: str, headers: Any = None, of: str = "") -> tuple[int, Any]:
    async with client.get(f"{RESPONSES}/{id}{of}", headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_by_the_id_of_its_last_response(
    engine: Engine, store: tuple[Path, int], stream: bool
) -> None:
    async def scenario(client: Client) -> None:
        first = await respond(client, instructions="be brief", stream=stream)
        assert await get(client, first["id"]) == (200, first)
        second = await respond(client, input="and then?", previous_response_id=first["id"])
        assert second["previous_response_id"] == first["id"]
        # The instructions are not of the conversation.
        whole = [{"role": "user", "content": BODY["input"]}, *first["output"]]
        asked = {"role": "user", "content": "and then?"}
        same = await respond(client, input=[*whole, asked])
        assert same["output"][0]["content"] == second["output"][0]["content"]
        assert same["usage"]["input_tokens"] == second["usage"]["input_tokens"]
        _, items = await get(client, second["id"], of="/input_items?order=asc")
        assert [item["role"] for item in items["data"]] == ["user", "assistant", "user"]
        # What was sent as a text comes back as a list of parts, as OpenAI's schema has it.
        asked_part = {"type": "input_text", "text": "and then?"}
        assert items["data"][-1]["content"] == [asked_part]
        assert [part["type"] for part in items["data"][1]["content"]] == ["output_text"]
        third = await respond(client, input="why?", previous_response_id=second["id"])
        assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]

    run(engine, scenario, response_store=store)


def test_input_items_come_in_pages(engine: Engine, store: tuple[Path, int]) -> None:
    turns = [{"role": "user", "content": f"number {i}"} for i in range(22)]

    async def scenario(client: Client) -> None:
        id = (await respond(client, input=turns))["id"]

        async def page(query: str) -> tuple[list[str], bool]:
            status, found = await get(client, id, of=f"/input_items?{query}")
            assert status == 200, found
            ids = [item["id"] for item in found["data"]]
            assert (found["first_id"], found["last_id"]) == (ids[0], ids[-1])
            assert [item["content"][0]["text"] for item in found["data"]] == [
                f"number {id.removeprefix('item_')}" for id in ids
            ]
            return ids, found["has_more"]

        newest = [f"item_{i}" for i in reversed(range(22))]
        assert await page("") == (newest[:20], True)
        assert await page("after=item_2&include[]=reasoning.encrypted_content") == (
            newest[20:],
            False,
        )
        assert await page("limit=2&order=asc") == (["item_0", "item_1"], True)
        assert await page("limit=2&order=asc&after=item_1") == (["item_2", "item_3"], True)
        assert await page("limit=100") == (newest, False)
        for query, status, param in (
            ("limit=0", 400, "limit"),
            ("limit=101", 400, "limit"),
            ("order=random", 400, "order"),
            ("after=item_22", 404, "after"),
            ("offset=1", 400, "offset"),
        ):
            found, body = await get(client, id, of=f"/input_items?{query}")
            assert (found, body["error"]["param"]) == (status, param)

    run(engine, scenario, response_store=store)


def test_a_deleted_response_is_gone(engine: Engine, store: tuple[Path, int]) -> None:
    async def scenario(client: Client) -> None:
        id = (await respond(client))["id"]
        async with client.delete(f"{RESPONSES}/{id}") as response:
            assert await response.json() == {"id": id, "object": "response", "deleted": True}
        status, error = await get(client, id)
        assert (status, error["error"]["code"]) == (404, "response_not_found")
        body = {**BODY, "previous_response_id": id}
        assert (await refused(client, RESPONSES, body, 404))["param"] == "previous_response_id"
        unkept = await respond(client, store=False)
        assert (await get(client, unkept["id"]))[0] == 404

    run(engine, scenario, response_store=store)


def test_a_response_is_made_in_the_background(engine: Engine, store: tuple[Path, int]) -> None:
    async def scenario(client: Client) -> None:
        queued = await respond(client, background=True)
        assert (queued["status"], queued["output"]) == ("queued", [])
        for _ in range(500):
            _, found = await get(client, queued["id"])
            if found["status"] not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.02)
        assert found["status"] in ("completed", "incomplete")
        assert found["output"][0]["type"] == "message"
        assert found["usage"]["output_tokens"] <= 6
        assert (await respond(client, previous_response_id=queued["id"]))["output"]

    run(engine, scenario, response_store=store)


def test_a_response_in_the_background_is_cancelled(engine: Engine, store: tuple[Path, int]) -> None:
    async def scenario(client: Client) -> None:
        queued = await respond(client, background=True, max_output_tokens=2000)
        while (await get(client, queued["id"]))[1]["status"] == "queued":
            await asyncio.sleep(0.02)
        assert (await get(client, queued["id"]))[1]["status"] == "in_progress"
        body = {**BODY, "previous_response_id": queued["id"]}
        assert "not finished" in (await refused(client, RESPONSES, body))["message"]
        async with client.post(f"{RESPONSES}/{queued['id']}/cancel", json={}) as response:
            assert (await response.json())["status"] == "cancelled"
        assert (await get(client, queued["id"]))[1]["status"] == "cancelled"
        whole = await respond(client)
        error = await refused(client, f"{RESPONSES}/{whole['id']}/cancel", {})
        assert "background" in error["message"]

    run(engine, scenario, response_store=store)


async def events_of(response: Any, most: int = 10**6) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async for line in response.content:
        if line.startswith(b"data: "):
            events.append(json.loads(line[6:]))
            if len(events) == most:
                break
    return events


def test_the_stream_of_a_response_in_the_background_goes_on_where_it_was_left(
    engine: Engine, store: tuple[Path, int]
) -> None:
    body = {**BODY, "background": True, "stream": True, "max_output_tokens": 60}

    async def scenario(client: Client) -> None:
        async with client.post(RESPONSES, json=body) as response:
            assert response.content_type == "text/event-stream"
            first = await events_of(response, most=5)
            response.close()  # the client is gone; the response is made all the same
        id, last = first[0]["response"]["id"], first[-1]["sequence_number"]
        path = f"{RESPONSES}/{id}?stream=true"
        async with client.get(f"{path}&starting_after={last}") as response:
            rest = await events_of(response)
        events = [*first, *rest]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        ended = events[-1]
        assert ended["type"] in ("response.completed", "response.incomplete")
        assert await get(client, id) == (200, ended["response"])
        text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
        assert text == ended["response"]["output"][0]["content"][0]["text"]
        # And again once it has ended.
        async with client.get(path) as response:
            assert await events_of(response) == events
        for wrong in ("x", "-2", "1.5"):
            status, error = await get(client, id, of=f"?stream=true&starting_after={wrong}")
            assert (status, error["error"]["param"]) == (400, "starting_after")
        plain = await respond(client)
        assert (await get(client, plain["id"], of="?stream=true"))[0] == 400
        await client.delete(f"{RESPONSES}/{id}")
        assert (await get(client, id, of="?stream=true"))[0] == 404

    run(engine, scenario, response_store=store)


def test_a_stream_ends_when_its_response_is_cancelled_or_fails(
    engine: Engine, store: tuple[Path, int]
) -> None:
    body = {**BODY, "background": True, "stream": True, "max_output_tokens": 1500}

    async def scenario(client: Client) -> None:
        async with client.post(RESPONSES, json=body) as response:
            (created,) = await events_of(response, most=1)
            id = created["response"]["id"]
            await client.post(f"{RESPONSES}/{id}/cancel", json={})
            await events_of(response)
        assert (await get(client, id))[1]["status"] == "cancelled"
        async with client.post(RESPONSES, json=body | {"timeout": 0.3}) as response:
            failed = (await events_of(response))[-1]
        assert failed["type"] == "response.failed"
        assert "timeout" in failed["response"]["error"]["message"]
        assert await get(client, failed["response"]["id"]) == (200, failed["response"])

    run(engine, scenario, response_store=store)


def test_what_the_server_ended_before_is_told(engine: Engine, store: tuple[Path, int]) -> None:
    ids = []

    async def begin(client: Client) -> None:
        ids.append((await respond(client, background=True, max_output_tokens=2000))["id"])
        ids.append((await respond(client))["id"])

    async def look(client: Client) -> None:
        assert (await get(client, ids[0]))[1]["status"] == "cancelled"
        assert (await get(client, ids[1]))[0] == 200

    run(engine, begin, response_store=store)
    run(engine, look, response_store=store)


def test_tenants_have_responses_of_their_own(
    engine: Engine, store: tuple[Path, int], tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(
        "".join(
            f'[tenants.{name}]\nkeys = ["sha256:{sha256(name.encode()).hexdigest()}"]\n'
            for name in ("ann", "bob")
        )
    )

    async def scenario(client: Client) -> None:
        ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
        id = (await respond(client, ann))["id"]
        assert (await get(client, id, ann))[0] == 200
        assert (await get(client, id, bob))[0] == 404
        async with client.delete(f"{RESPONSES}/{id}", headers=bob) as response:
            assert response.status == 404

    run(engine, scenario, response_store=store, tenants=Tenants(file))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
    ],
)
def test_without_a_store_nothing_is_kept(
    engine: Engine, options: dict[str, Any], param: str
) -> None:
    async def scenario(client: Client) -> None:
        error = await refused(client, RESPONSES, {**BODY, **options})
        assert error["param"] == param
        assert "--response-store" in error["message"]
        kept = await respond(client, store=True)
        assert (await get(client, kept["id"]))[0] == 404

    run(engine, scenario)


def stored(number: int, owner: str = "", status: str = "completed", size: int = 300) -> Any:
    text = random.Random(number).randbytes(size).hex()
    response = {"id": f"resp_{number}", "status": status, "output": [], "error": None}
    return StoredResponse(owner, response, [{"role": "user", "content": text}])


def kept(store: ResponseStore, owner: str = "") -> list[int]:
    async def main() -> list[int]:
        return [n for n in range(20) if await store.get(f"resp_{n}", owner) is not None]

    return asyncio.run(main())


def test_the_oldest_responses_of_an_owner_give_way(tmp_path: Path) -> None:
    path = tmp_path / "a" / "responses.db"
    store = ResponseStore(path, 2000)
    store.save(stored(9, "bob"))
    for number in range(8):
        store.save(stored(number))
    store.save(stored(15, size=5000))  # more than there is room
    store.close()
    store = ResponseStore(path, 2000)
    found = kept(store)
    assert found == list(range(found[0], 8))
    assert 1 < len(found) < 8
    assert kept(store, "bob") == [9]
    store.close()
    assert path.stat().st_mode & 0o077 == 0


def test_a_response_that_was_not_finished_has_failed_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    store = ResponseStore(path, 1 << 20)
    store.save(stored(1, status="queued"))
    store.save(stored(2))
    store.close()
    store = ResponseStore(path, 1 << 20)
    one, two = (asyncio.run(store.get(f"resp_{n}", "")) for n in (1, 2))
    store.close()
    assert one is not None
    assert one.response["status"] == "failed"
    assert "ended" in one.response["error"]["message"]
    assert two is not None
    assert two.response["status"] == "completed"


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    path.write_text("no database" * 100)
    with pytest.raises(OSError, match=r"responses\.db cannot be used"):
        ResponseStore(path, 1)


def test_two_servers_do_not_share_a_store(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    first = ResponseStore(path, 1)
    with pytest.raises(OSError, match="in use by another server"):
        ResponseStore(path, 1)
    first.close()
    ResponseStore(path, 1).close()


def test_the_events_of_the_oldest_responses_give_way() -> None:
    logs = EventLogs(most_bytes=25)
    for id in "abcd":
        logs.begin(id).add(b"x" * 10)
    logs.end("b")  # which alone may be forgotten: the others are being made
    assert [id for id in "abcd" if logs.find(id)] == ["a", "c", "d"]
    logs.end("d")
    logs.end("a")
    assert [id for id in "abcd" if logs.find(id)] == ["a", "c"]


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "responses.db"

    def large(id: str) -> StoredResponse:
        words = random.Random(id).randbytes(50_000).hex()
        return StoredResponse("", {"id": id, "status": "completed", "output": words}, [])

    async def scenario() -> None:
        store = ResponseStore(path, 1 << 20)
        await store.ready()
        store._connection.execute("PRAGMA max_page_count = 8")  # the disk is full
        store.save(large("a"))
        store.save(large("b"))
        assert not await store.delete("c", "")
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError) as full:
                await store.ready()
            assert as_api_error(full.value, "id").status == 507
        assert await store.get("a", "") == large("a")
        assert await store.get("a", "another") is None
        assert await store.delete("b", "")
        store._connection.execute("PRAGMA max_page_count = 100000")
        await store.ready()
        store.close()
        store = ResponseStore(path, 1 << 20)
        assert await store.get("a", "") == large("a")
        assert await store.get("b", "") is None
        store.close()

    asyncio.run(scenario())
    told = [record.message for record in caplog.records if "responses" in record.message]
    assert told == ["responses cannot be stored: database or disk is full"]


def test_one_that_is_no_json_is_told_of_and_hinders_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = ResponseStore(tmp_path / "responses.db", 1 << 20)
        for id, output in (("a", [object()]), ("b", [])):
            store.save(StoredResponse("", {"id": id, "status": "completed", "output": output}, []))
        assert not await store.delete("c", "")  # behind what is being written
        await store.ready()
        assert await store.get("a", "") is None
        assert await store.get("b", "") is not None
        store.close()

    asyncio.run(scenario())
    assert "response a cannot be stored" in caplog.text


def test_a_response_that_could_not_be_stored_is_not_begun(
    engine: Engine, store: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: ResponseStore) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr(ResponseStore, "ready", full)

    async def scenario(client: Client) -> None:
        for body in (BODY, BODY | {"background": True}):
            async with client.post(RESPONSES, json=body) as response:
                assert response.status == 507
                assert (await response.json())["error"]["code"] == "disk_full"
        assert (await respond(client, store=False))["output"]

    run(engine, scenario, response_store=store)
