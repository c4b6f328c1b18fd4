"""Logs as text, or as one JSON object a line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic_core import to_json

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LogFormat = Literal["text", "json"]
_OWN = ("time", "level", "logger", "message")


@dataclass(frozen=True)
class LogEvent:
    """A log message with fields: ``name key=value …`` in text, members of the object in JSON.

    Fields that are None are left out.
    """

    name: str
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        assert not any(key in _OWN for key in self.fields)

    def known(self) -> dict[str, Any]:
        return {key: value for key, value in self.fields.items() if value is not None}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.known().items())])


class JsonFormatter(logging.Formatter):
    """Time (RFC 3339, UTC), level, logger, message, the fields of an LogEvent, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        event = record.msg if isinstance(record.msg, LogEvent) else None
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage() if event is None else event.name,
        }
        if event is not None:
            entry |= event.known()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return to_json(entry, fallback=str).decode()


def configure(level: str, format: LogFormat) -> None:
    """Send this process' logs to stderr, and with JSON also Python's warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(format == "json")
    logging.getLogger("aiohttp.server").addFilter(_without_its_bytes)
    logging.getLogger("torch").setLevel(max(logging.WARNING, logging.root.level))  # its statistics


def _without_its_bytes(record: logging.LogRecord) -> bool:
    """Drop what aiohttp quotes of a malformed request: there may be a key in it."""
    from aiohttp.http_exceptions import HttpProcessingError  # heavy for `--help`

    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.exc_info = None
        record.msg, record.args = "a request was no HTTP and got 400", ()
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


def error(message: str) -> None:
    """Log the error that ends the process."""
    logging.getLogger(__package__).error(message)
