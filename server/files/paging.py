"""OpenAI's pages: ``limit`` of a list, ``after`` the last one of the page before."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from aiohttp import web

from nybble.server.http.errors import ApiError

T = TypeVar("T")

_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Page:
    """One page of a list.

    newest: whether the newest come first.
    after: the last id of the page before; None for the first page.
    """

    limit: int
    after: str | None
    newest: bool = True

    @classmethod
    def of(
        cls, request: web.Request, *, default: int, most: int, others: Sequence[str] = ()
    ) -> Page:
        """Read from the query, in which ``others`` are allowed too. Raises ApiError 400."""
        known = {"limit", "after", *others}
        if unknown := sorted(request.query.keys() - known):
            raise _invalid(unknown[0], f"unknown parameter: {unknown[0]}")
        text = request.query.get("limit", str(default))
        if not (_NUMBER.fullmatch(text) and 1 <= int(text) <= most):
            raise _invalid("limit", f"limit: expected 1 to {most}, not {text!r}")
        order: str | Literal["asc", "desc"] = request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise _invalid("order", f"order is {order!r}, expected asc or desc")
        return cls(int(text), request.query.get("after") or None, order == "desc")

    def body(self, items: Sequence[T], shown: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
        """A list object of ``items``, which may hold one more than the limit."""
        data = [shown(item) for item in items[: self.limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(items) > self.limit,
        }


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
