"""Bearer keys, kept as hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import web
from nybble.server.errors import ApiError


class Keys:
    """A set of keys, any of which opens."""

    def __init__(self, keys: Iterable[str], *, kind: str) -> None:
        """kind: what the error calls them, such as ``API key``."""
        # Hashes of equal length, all compared: the time taken tells nothing about any key.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._kind = kind

    def __bool__(self) -> bool:
        return bool(self._digests)

    def require(self, request: web.Request) -> None:
        """Raises ApiError 401 for a request that carries none of them."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        found = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        matches = [hmac.compare_digest(found, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                f"a valid {self._kind} is required: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
