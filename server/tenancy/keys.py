"""Bearer keys, kept as hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import web

from nybble.server.http.errors import ApiError


class Keys:
    """A set of keys, any of which grants access."""

    def __init__(self, keys: Iterable[str], *, kind: str) -> None:
        """kind: what the error calls them, such as ``API key``.

        Raises ValueError for a key that is empty or begins or ends with a space: anyone, or nobody,
        could send it.
        """
        keys = require_keys(keys, kind)
        # Hashes of equal length, all of which are compared: timing reveals nothing about a key.
        self._digests = [_digest(key) for key in keys]
        self._kind = kind

    def __bool__(self) -> bool:
        return bool(self._digests)

    def require(self, request: web.Request) -> None:
        """Raises ApiError 401 for a request that carries none of them."""
        key = bearer(request)
        if key is None or not self.hold(key):
            raise self.refusal()

    def hold(self, key: str) -> bool:
        found = _digest(key)
        return any([hmac.compare_digest(found, digest) for digest in self._digests])  # noqa: C419

    def refusal(self) -> ApiError:
        return ApiError(
            401,
            f"a valid {self._kind} is required: Authorization: Bearer KEY",
            code="invalid_api_key",
        )


def require_keys(keys: Iterable[str], kind: str) -> tuple[str, ...]:
    """The same keys. Raises ValueError as :class:`Keys` does, which calls a key ``kind``."""
    keys = tuple(keys)
    for key in keys:
        if not key.strip():
            raise ValueError(f"{kind} is empty: anyone could send it")
        if key != key.strip():
            raise ValueError(f"{kind} begins or ends with a space, which no request can send")
    return keys


def _digest(key: str) -> bytes:
    # In headers and on command lines, Python decodes invalid UTF-8 to surrogates.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def bearer(request: web.Request) -> str | None:
    """The key of a request, as a bearer or in Anthropic's header; None if it has none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return request.headers.get("X-Api-Key")
