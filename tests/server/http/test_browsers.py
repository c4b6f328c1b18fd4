"""Web pages cannot use a server through the browser of whoever runs it."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from nybble.engine import Engine
from nybble.server.http.cors import Cors

from ..client import CHAT, HELLO, Client, run
from ..conftest import ServerProcess

BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
PAGE = "https://elsewhere.example"


async def asked(client: Client, **headers: str) -> tuple[int, Any]:
    async with client.post(CHAT, json=BODY, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", None],
)
@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_a_body_has_to_say_that_it_is_json(
    engine: Engine, content_type: str | None, keys: tuple[str, ...]
) -> None:
    """What a page may send without a preflight. It is also what curl sends by default."""

    async def scenario(client: Client) -> None:
        headers = {"Authorization": "Bearer secret"}
        if content_type is not None:
            headers["Content-Type"] = content_type
        async with client.post(
            CHAT,
            data=json.dumps(BODY).encode(),
            headers=headers,
            skip_auto_headers=["Content-Type"],
        ) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (415, "unsupported_media_type")
        assert "-H 'Content-Type: application/json'" in error["message"]

    run(engine, scenario, api_keys=keys)


def test_json_may_name_its_charset_and_an_empty_body_need_not_be_anything(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        async with client.post(CHAT, data=json.dumps(BODY).encode(), headers=headers) as response:
            assert response.status == 200
        async with client.post("/nowhere", data=b"x") as response:
            assert response.status == 404
        async with client.post(CHAT, skip_auto_headers=["Content-Type"]) as response:
            assert (await response.json())["error"]["code"] == "invalid_json"

    run(engine, scenario)


@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost:1", "http://127.0.0.1"])
def test_a_page_of_another_origin_is_refused_where_no_key_is_asked_for(
    engine: Engine, origin: str
) -> None:
    async def scenario(client: Client) -> None:
        status, body = await asked(client, Origin=origin)
        assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
        assert origin in body["error"]["message"]
        assert "--allowed-origins" in body["error"]["message"]

    run(engine, scenario)


def test_the_servers_own_page_allowed_pages_and_programs_are_not(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        own = f"http://{client.host}:{client.port}"
        for origin in (own, PAGE.upper()):
            assert (await asked(client, Origin=origin))[0] == 200, origin
        # Behind a proxy that gives another Host, the browser's own word counts.
        proxied = {"Origin": "https://chat.example", "Sec-Fetch-Site": "same-origin"}
        assert (await asked(client, **proxied))[0] == 200
        assert (await asked(client))[0] == 200
        async with client.get("/v1/models", headers={"Origin": "null"}) as response:
            assert response.status == 200  # and no page can read it, see test_security

    run(engine, scenario, cors=Cors([PAGE]))
    run(engine, lambda client: _any_page(client), cors=Cors(["*"]))


async def _any_page(client: Client) -> None:
    assert (await asked(client, Origin="https://a.example"))[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("app.localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7", 200),
        ("box.lan:8000", 200),
        ("rebound.example:8000", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_rebound_to_this_machine_is_not_answered(
    engine: Engine, host: str, status: int
) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/v1/models", headers={"Host": host}) as response:
            assert response.status == status
            if status == 403:
                error = (await response.json())["error"]
                assert error["code"] == "host_not_allowed"
                assert "--allowed-hosts" in error["message"]

    run(engine, scenario, allowed_hosts=("box.lan",))


@pytest.mark.parametrize("options", [{"allowed_hosts": None}, {"api_keys": ("secret",)}])
def test_names_are_free_where_any_is_allowed_or_a_key_asked_for(
    engine: Engine, options: dict[str, Any]
) -> None:
    async def scenario(client: Client) -> None:
        headers = {"Host": "any.example", "Authorization": "Bearer secret"}
        async with client.get("/v1/models", headers=headers) as response:
            assert response.status == 200

    run(engine, scenario, **options)


async def _get(url: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status


def test_a_server_on_a_loopback_address_is_guarded(server: ServerProcess) -> None:
    import asyncio

    url = f"{server.url}/v1/models"
    assert asyncio.run(_get(url)) == 200
    assert asyncio.run(_get(url, Host="rebound.example")) == 403
