"""A body of any size is read without holding up other requests."""

from __future__ import annotations

import copy
import gc
import gzip
import json
import threading
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nybble.engine import Engine
from nybble.server.api import parse
from nybble.server.api.body import Body
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.messages_schema import MessagesRequest
from nybble.server.api.openapi import BODIES
from nybble.server.api.parse import parse_body
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.batches.schema import CreateBatch
from nybble.server.http.errors import ApiError
from nybble.server.training.schema import CreateJob

from ...fuzz.targets import EXAMPLES, places
from ..client import CHAT, JSON, Client, refused, run

_MANY, _FEW = 2000, 1100  # a logit_bias may have 1,024
_WRONG: list[Any] = [
    *([each] * _MANY for each in (5, None, "x", [], {}, {"a": {}}, {"type": "text"})),
    *([each] * _MANY for each in ({"type": "other"}, {"role": "user"})),
    [{"role": "user", "content": [{}] * _MANY}] * 3,
    *({str(index): value for index in range(_MANY)} for value in ("x", [], 1)),
]


def errors_of(kind: type[BaseModel], body: Any) -> int:
    try:
        kind.model_validate(body)
    except ValidationError as invalid:
        return invalid.error_count()
    return 0


@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_is_wrong_in_many_places_has_few_errors(path: str) -> None:
    for example in EXAMPLES[path]:
        for *outer, last in places(example):
            for wrong in _WRONG:
                body = copy.deepcopy(example)
                node = body
                for key in outer:
                    node = node[key]
                node[last] = wrong
                assert errors_of(BODIES[path], body) < _FEW, (outer, last, str(wrong)[:40])


@pytest.mark.parametrize("kind", [*dict.fromkeys(BODIES.values()), CreateBatch, CreateJob])
def test_a_field_that_is_wrong_in_many_places_has_few_errors(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        for wrong in _WRONG:
            assert errors_of(kind, {field.alias or name: wrong}) < _FEW, str(wrong)[:40]
    assert errors_of(kind, {f"unknown_{index}": 1 for index in range(_MANY)}) < _FEW


def test_a_compressed_body_is_parsed_by_its_real_size(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[tuple[str, bool]] = []
    validated = parse.validated

    def spied(*args: Any) -> Any:
        threads.append((threading.current_thread().name, gc.isenabled()))
        return validated(*args)

    monkeypatch.setattr(parse, "validated", spied)

    async def scenario(client: Client) -> None:
        for parts in (5, 1 << 18):
            messages = [{"role": "user", "content": [{}] * parts}]
            body = gzip.compress(json.dumps({"messages": messages}).encode())
            assert len(body) < 1 << 13
            headers = JSON | {"Content-Encoding": "gzip"}
            async with client.post(CHAT, data=body, headers=headers) as response:
                error = (await response.json())["error"]
                assert (response.status, error["param"]) == (400, "messages[0].content[0].type")

    run(engine, scenario)
    (small, small_collects), (large, large_collects) = threads
    assert (small, small_collects) == (threading.current_thread().name, True)
    assert (large.startswith("nybble-parse"), large_collects) == (True, False)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("kind", "field", "part"),
    [
        (ChatRequest, "messages", "text"),
        (MessagesRequest, "messages", "text"),
        (ResponsesRequest, "input", "input_text"),
    ],
)
def test_messages_have_a_limit_of_parts_together(kind: type[Body], field: str, part: str) -> None:
    body = {"model": "tiny", "max_tokens": 5} if kind is MessagesRequest else {"model": "tiny"}
    for count, fits in ((4096, True), (4097, False)):
        content = [{"type": part, "text": "a"}] * count
        sent = json.dumps(body | {field: [{"role": "user", "content": content}] * 8}).encode()
        if fits:
            parse_body(sent, kind)
            continue
        with pytest.raises(ApiError, match="parts and calls") as caught:
            parse_body(sent, kind)
        assert caught.value.param == field


def test_an_error_keeps_nothing_of_a_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiError) as caught:
        parse._uncollected(lambda: parse_body(b'{"messages": [{"role": "pirate"}]}', ChatRequest))
    assert caught.value.__context__ is None
    trace, frames = caught.value.__traceback__, []
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "validated" not in frames
    assert frames[-1] == "_uncollected"


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[' + b"{}," * (1 << 19) + b"{}]}",
        b'{"messages":[' + b"[]," * (1 << 19) + b"{}]}",
        b"{" + b'"a":0,' * (1 << 19) + b'"a":0}',
        b'{"messages":[' + b"0," * (1 << 21) + b"0," + b"{}]}",
    ],
    ids=["objects", "lists", "fields", "numbers"],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    read: list[int] = []
    from_json = parse.from_json

    def spied(data: bytes, **options: Any) -> Any:
        read.append(len(data))
        return from_json(data, **options)

    monkeypatch.setattr(parse, "from_json", spied)

    async def scenario(client: Client) -> None:
        error = await refused(client, CHAT, body)
        assert "too many" in error["message"]

    run(engine, scenario)
    assert not read
