"""Grammars that are deep, large or slow to compile hold up nobody and end nothing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nybble.engine import Engine
from nybble.server.api.compile_pool import CompilePool
from nybble.server.http.errors import ApiError

from ..client import COMPLETIONS, Client, refused, run


def chain(rules: int) -> str:
    """A grammar whose rules each name the next: in a thread's usual stack it ends the process."""
    lines = [f'r{index}: "a" r{index + 1}' for index in range(rules)]
    return "\n".join(["start: r0", *lines, f'r{rules}: "b"'])


def test_a_deep_grammar_is_compiled_and_a_huge_one_refused(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0}
        async with client.post(COMPLETIONS, json=body | {"guided_grammar": chain(9000)}) as answer:
            assert (await answer.json())["choices"][0]["text"] == "aaa"
        for param, value in (
            ("guided_grammar", chain(50_000)),
            ("guided_regex", "a|" * 200_000),
            ("guided_choice", [f"choice {index}" for index in range(50_000)]),
            ("guided_json", {"enum": [f"value {index}" for index in range(50_000)]}),
        ):
            error = await refused(client, COMPLETIONS, body | {param: value})
            assert error["param"] == param

    run(engine, scenario)


def test_what_takes_too_long_is_told_so_and_those_behind_it_to_come_again() -> None:
    release = threading.Event()

    async def both() -> list[ApiError]:
        pool = CompilePool(workers=1, seconds=0.1)
        slow = pool.run(release.wait, "guided_regex")
        behind = pool.run(lambda: None, "guided_json")
        found = await asyncio.gather(slow, behind, return_exceptions=True)
        release.set()
        assert await pool.run(lambda: 5, "guided_json") == 5
        return [error for error in found if isinstance(error, ApiError)]

    slow, behind = asyncio.run(both())
    assert (slow.status, slow.param) == (400, "guided_regex")
    assert (behind.status, behind.code) == (503, "overloaded")
    assert behind.retry_after


def test_what_a_compilation_raises_comes_through() -> None:
    def wrong() -> None:
        raise ValueError("at 1(8)")

    with pytest.raises(ValueError, match="at 1"):
        asyncio.run(CompilePool().run(wrong, "guided_regex"))
