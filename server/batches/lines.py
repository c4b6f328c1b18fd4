"""The lines of a batch's file: each a request as JSON, as OpenAI's Batch API has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic_core import from_json, to_json

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)

MAX_LINES = 50_000
_MAX_LINE_BYTES = 16 << 20  # as of an HTTP request's body
_MAX_ID = 512
_MAX_ERRORS = 100  # told of one file


class LineError(ValueError):
    """What is wrong with a line.

    param: the field at fault.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param

    def body(self, number: int) -> dict[str, Any]:
        """As a batch lists it. number: of the line, from 1."""
        where = {"line": number, "param": self.param}
        return {"code": self.code, "message": self.message, **where}


@dataclass(frozen=True)
class Line:
    """A request.

    url: the endpoint that answers it.
    """

    custom_id: str
    url: Endpoint
    body: dict[str, Any]

    @classmethod
    def of(cls, data: bytes) -> Line:
        """Raises LineError."""
        try:
            line = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise LineError("invalid_json_line", f"this line is not valid JSON: {error}") from None
        if not isinstance(line, dict):
            raise LineError("invalid_json_line", "expected a JSON object in each line")
        custom_id = _string(line, "custom_id")
        if len(custom_id) > _MAX_ID:
            raise LineError(
                "invalid_value", f"custom_id is longer than {_MAX_ID} characters", "custom_id"
            )
        method, url, body = _string(line, "method"), _string(line, "url"), line.get("body")
        if method != "POST":
            raise LineError("invalid_method", f"method is {method!r}, expected 'POST'", "method")
        if url not in ENDPOINTS:
            raise LineError(
                "invalid_url", f"url is {url!r}, expected one of {', '.join(ENDPOINTS)}", "url"
            )
        if not isinstance(body, dict):
            raise LineError(
                "missing_required_parameter", "expected the request as an object in body", "body"
            )
        return cls(custom_id, url, body)

    @property
    def model(self) -> str | None:
        """The model that the request names, if it names one."""
        model = self.body.get("model")
        return model if isinstance(model, str) and model else None


def _string(line: dict[str, Any], name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value:
        raise LineError("missing_required_parameter", f"expected a string in {name}", name)
    return value


@dataclass
class LineIndex:
    """Where the lines of a file are, and what is wrong with them.

    offsets: where each line begins, in bytes; blank lines are left out.
    custom_ids: of the lines.
    model: the one that all of them name; None if they name none.
    """

    path: Path
    offsets: list[int] = field(default_factory=list)
    custom_ids: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    model: str | None = None

    @classmethod
    def read(cls, path: Path, endpoint: Endpoint | None = None) -> LineIndex:
        """Look at every line.

        endpoint: all lines must be for it, and for one model; None if each may have its own.
        """
        index, seen = cls(path), set[str]()
        with_model = False
        for number, offset, data in _lines(path):
            try:
                if len(index.offsets) == MAX_LINES:
                    raise LineError("too_many_tasks", f"a file may have {MAX_LINES} requests")
                if len(data) > _MAX_LINE_BYTES:
                    message = f"this line is longer than {_MAX_LINE_BYTES} bytes"
                    raise LineError("invalid_json_line", message)
                line = Line.of(data)
                if line.custom_id in seen:
                    message = f"another line has the custom_id {line.custom_id!r}"
                    raise LineError("duplicate_custom_id", message, "custom_id")
                if endpoint not in (None, line.url):
                    message = f"url is {line.url!r}, but the batch's endpoint is {endpoint!r}"
                    raise LineError("mismatched_url", message, "url")
                if endpoint is not None and with_model and line.model != index.model:
                    message = f"the model is {line.model!r}, in the lines before {index.model!r}"
                    raise LineError("mismatched_model", message, "body.model")
            except LineError as error:
                index.errors.append(error.body(number))
                if error.code == "too_many_tasks" or len(index.errors) == _MAX_ERRORS:
                    return index
                continue
            index.model, with_model = line.model, True
            seen.add(line.custom_id)
            index.custom_ids.append(line.custom_id)
            index.offsets.append(offset)
        if not index.offsets and not index.errors:
            index.errors.append({"code": "empty_file", "message": "the file has no requests"})
        return index

    def line(self, position: int) -> Line:
        """Raises LineError and OSError if the file has changed."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[position])
            return Line.of(file.readline())


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank; too long ones are cut off."""
    number = offset = 0
    with path.open("rb") as file:
        while data := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            size = len(data)
            while not data.endswith(b"\n") and (rest := file.readline(_MAX_LINE_BYTES)):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            if data.strip():
                yield number, offset, data
            offset += size


def result_line(id: str, custom_id: str, *, status: int, request_id: str, body: bytes) -> bytes:
    """A line of a file of results, for a request that was answered. body: JSON."""
    head = to_json({"id": id, "custom_id": custom_id})[:-1]
    told = to_json({"status_code": status, "request_id": request_id})[:-1]
    return b'%b,"response":%b,"body":%b},"error":null}\n' % (head, told, body)


def error_line(id: str, custom_id: str, code: str, message: str) -> bytes:
    """A line of a file of errors, for a request that was not answered."""
    error = {"code": code, "message": message}
    return to_json({"id": id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"
