"""Answers a line as its endpoint would: the same for batches of a server and of a file offline."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from pydantic_core import to_json

from nybble.server.api.call import Call
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.embeddings import EmbeddingRequest
from nybble.server.api.endpoints import Endpoints
from nybble.server.api.generation import Generation, SequenceGroup
from nybble.server.api.parse import UnknownFields, validated
from nybble.server.api.respond import WholeFormatter, whole_body
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest
from nybble.server.batches.lines import Line, error_line, result_line
from nybble.server.http import retry_after
from nybble.server.http.errors import ApiError
from nybble.server.observability.request_record import RequestRecord
from nybble.server.tenancy.tenants import Tenant

# Errors that say something of the moment and nothing of the line.
_OF_THE_MOMENT = (429, 503)
# How often a line is tried again after errors other than those of limits: it may be their cause.
_MAX_TRIES = 3


@dataclass(frozen=True)
class Answer:
    """A line of the file of results.

    ok: whether the request succeeded.
    code: of an error of the batch rather than of the request.
    """

    data: bytes
    ok: bool
    code: str | None = None

    @classmethod
    def none(cls, custom_id: str, code: str, message: str) -> Answer:
        """For a request that is not answered."""
        return cls(error_line(_line_id(), custom_id, code, message), False, code)


class Answers:
    def __init__(
        self,
        endpoints: Endpoints,
        generation: Generation,
        unknown: UnknownFields,
        *,
        background: bool,
    ) -> None:
        """background: whether lines take only the room that others leave."""
        self._endpoints = endpoints
        self._generation = generation
        self._unknown = unknown
        self._background = background

    async def answer(self, line: Line, tenant_of: Callable[[], Tenant | None]) -> Answer:
        """Run a line to its end. While the server or the tenant is at a limit, it waits.

        tenant_of: whose line it is, as the tenants' file has it now. Raises ApiError if it is gone.
        """
        tries = 0
        while True:
            record = RequestRecord("req_" + secrets.token_hex(12))
            try:
                body, status = await self._run(line, tenant_of(), record), 200
            except Exception as caught:
                error = record.failed(caught)
                passing = error.status in _OF_THE_MOMENT or error.code == "engine_failed"
                tries += error.status != 429
                if passing and tries < _MAX_TRIES:
                    await asyncio.sleep(error.retry_after or retry_after.BUSY)
                    continue
                body, status = to_json(error.body()), error.status
            data = result_line(
                _line_id(), line.custom_id, status=status, request_id=record.id, body=body
            )
            return Answer(data, status == 200)

    async def _run(self, line: Line, tenant: Tenant | None, record: RequestRecord) -> bytes:
        with ExitStack() as leases:  # a line may wait for room with its adapter
            call = Call(tenant, record, leases=leases)
            group, formatter = await self._prepared(line, call)
            group = replace(group, background=self._background)
            return await whole_body(
                self._generation, group, formatter, record, _limited(group.timeout)
            )

    async def _prepared(self, line: Line, call: Call) -> tuple[SequenceGroup, WholeFormatter]:
        for field in ("stream", "background"):
            if line.body.get(field):
                raise ApiError(
                    400,
                    f"{field} is not supported in a batch",
                    param=field,
                    code="unsupported_parameter",
                )
        given = line.body.copy()
        match line.url:
            case "/v1/chat/completions":
                chat = validated(given, ChatRequest, self._unknown)
                return await self._endpoints.chat(chat, call)
            case "/v1/completions":
                completion = validated(given, CompletionRequest, self._unknown)
                return await self._endpoints.completion(completion, call)
            case "/v1/embeddings":
                embedding = validated(given, EmbeddingRequest, self._unknown)
                return await self._endpoints.embedding(embedding, call)
            case "/v1/responses":
                response = validated(given, ResponsesRequest, self._unknown)
                group, formatter, _ = await self._endpoints.response(response, call)
                return group, formatter


def _line_id() -> str:
    return "batch_req_" + secrets.token_hex(12)


@asynccontextmanager
async def _limited(timeout: float | None) -> AsyncGenerator[None]:
    """Raises ApiError 504 at the end of the line's own time."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError:
        raise ApiError(504, "the request's timeout has passed", code="timeout") from None
