"""Multipart forms are read whole, in whatever pieces they come, and given up on where none does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from nybble.server.http import form_parts
from nybble.server.http.errors import ApiError, as_api_error

HEADERS = {"Content-Type": "multipart/form-data; boundary=cut"}


def form(**fields: str) -> bytes:
    parts = "".join(
        f'--cut\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    return f"{parts}--cut--\r\n".encode()


def answer(*pieces: bytes, pause: float = 0.0) -> tuple[int, str]:
    """Status and text for a form that comes in pieces: its fields, or what is wrong with it."""

    async def read(request: web.Request) -> web.Response:
        try:
            found = [
                f"{part.name}={await form_parts.text(part)}"
                async for part in form_parts.parts(request, ("name", "purpose"))
            ]
        except Exception as error:
            failure = as_api_error(error, "id")
            return web.Response(status=failure.status, text=failure.message)
        return web.Response(text="&".join(found))

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await asyncio.sleep(pause)

    async def scenario() -> tuple[int, str]:
        app = web.Application()
        app.router.add_post("/", read)
        async with (
            TestClient(TestServer(app)) as client,
            client.post("/", data=body(), headers=HEADERS) as response,
        ):
            return response.status, await response.text()

    return asyncio.run(scenario())


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_value_that_comes_in_pieces_is_read_whole(size: int) -> None:
    whole = form(name="a-long-name", purpose="fine-tune")
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert answer(*pieces, pause=0.001) == (200, "name=a-long-name&purpose=fine-tune")


def test_a_value_that_is_too_long_is_refused() -> None:
    assert answer(form(name="x" * 1024))[0] == 200
    assert answer(form(name="x" * 1025)) == (400, "name is longer than 1024 bytes")


def test_a_part_of_another_name_is_refused() -> None:
    assert answer(form(other="x")) == (400, "unknown parameter: other")


@pytest.mark.parametrize("at", [20, 60, 70])
def test_a_form_that_stops_coming_is_given_up_on(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_parts, "_STALL_SECONDS", 0.1)
    whole = form(name="a-long-name")
    assert answer(whole[:at], whole[at:], pause=0.5) == (408, "nothing arrived for 0.1 seconds")


@pytest.mark.parametrize("at", range(0, 73, 3))
def test_a_form_that_is_cut_short_is_refused(at: int) -> None:
    status, message = answer(form(name="a-long-name")[:at])
    assert status == 400, message


def test_an_error_can_be_written_whatever_it_quotes() -> None:
    error = ApiError(400, "f\udce9le", param="f\ud800le")
    for anthropic in (False, True):
        response = error.response(anthropic=anthropic)
        assert isinstance(response.body, bytes)
        assert b"f?le" in response.body
    assert error.body()["error"]["param"] == "f?le"
