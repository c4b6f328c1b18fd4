"""Tenants, their keys, models and limits: a TOML file, which can be reloaded.

    [tenants.acme]
    keys = ["sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"]
    models = ["*"]
    adapters = ["acme-*"]
    weight = 2
    requests_per_minute = 600
    tokens_per_minute = 100_000
    max_concurrency = 16
    fine_tuning = true

Everything but ``keys`` may be left out. The defaults are all models and adapters, weight 1, no
limits, and no fine-tuning. A key is stored as the SHA-256 of its text (``nybble new-key`` makes
both), which is safe for random keys. Patterns are shell patterns.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Self

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

logger = logging.getLogger(__name__)

_HASH = r"^sha256:[0-9a-f]{64}$"
# In place of the library's, which speak of fields and inputs.
_MESSAGES = {
    "missing": "it has to be given",
    "extra_forbidden": "there is no such setting",
    "string_pattern_mismatch": "expected sha256: and 64 digits, as nybble new-key prints it",
}


class TenantsError(ValueError):
    """The tenants file cannot be used; the message names the entry at fault."""


class Tenant(BaseModel):
    """One entry of the file. A tenant's limits are shared by all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1)]
    keys: tuple[Annotated[str, Field(pattern=_HASH)], ...] = Field(min_length=1)
    models: tuple[str, ...] = ("*",)
    adapters: tuple[str, ...] = ("*",)
    weight: Annotated[float, Field(gt=0)] = 1.0
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    fine_tuning: bool = False

    def may_use_model(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.models)

    def may_use_adapter(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


TENANT = web.RequestKey("tenant", Tenant)  # set if the request has a tenant's key


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: Mapping[str, Tenant]

    @model_validator(mode="before")
    @classmethod
    def _name(cls, data: object) -> object:
        if data == {}:
            raise ValueError("it has no tenants, expected a table [tenants.NAME] for each")
        tenants = data.get("tenants") if isinstance(data, dict) else None
        if not isinstance(tenants, dict):
            return data
        named = {
            name: {**entry, "name": name} if isinstance(entry, dict) else entry
            for name, entry in tenants.items()
        }
        assert isinstance(data, dict)
        return {**data, "tenants": named}

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        owner: dict[str, str] = {}
        for tenant in self.tenants.values():
            for key in tenant.keys:
                if owner.setdefault(key, tenant.name) != tenant.name:
                    raise ValueError(f"{owner[key]} and {tenant.name} have a key in common")
        return self


class Tenants:
    """The tenants of a file, found by their keys."""

    def __init__(self, path: Path) -> None:
        """Raises TenantsError."""
        self._path = path
        self._tenants, self._digests = self._read()

    def reload(self) -> None:
        """Read the file again. If it is invalid, everything stays as it was."""
        try:
            self._tenants, self._digests = self._read()
        except TenantsError as error:
            logger.error("the tenants stay as they were: %s", error)
        else:
            logger.info("%s was read again", self._path)

    def find(self, key: str) -> Tenant | None:
        """The tenant of a key. Every hash is compared, so timing reveals nothing."""
        found = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        tenant = None
        for digest, owner in self._digests:
            if hmac.compare_digest(found, digest):
                tenant = owner
        return tenant

    def named(self, name: str) -> Tenant | None:
        return self._tenants.get(name)

    def now(self, tenant: Tenant) -> Tenant:
        """A tenant that was found earlier, as the file has it now; unchanged if it is gone."""
        return self._tenants.get(tenant.name, tenant)

    def _read(self) -> tuple[Mapping[str, Tenant], Sequence[tuple[bytes, Tenant]]]:
        """Tenants by name, and by the digest of each key."""
        try:
            file = _File.model_validate(tomllib.loads(self._path.read_text()))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TenantsError(f"{self._path} cannot be read: {error}") from error
        except ValidationError as invalid:
            first = invalid.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            message = _MESSAGES.get(first["type"], first["msg"]).removeprefix("Value error, ")
            where = f"{self._path}: {place}" if place else f"{self._path}"
            raise TenantsError(f"{where}: {message}") from None
        return file.tenants, [
            (bytes.fromhex(key.removeprefix("sha256:")), tenant)
            for tenant in file.tenants.values()
            for key in tenant.keys
        ]


def new_key() -> tuple[str, str]:
    """A random key, and its hash for the tenants file."""
    key = "nyb-" + secrets.token_urlsafe(32)
    return key, "sha256:" + hashlib.sha256(key.encode()).hexdigest()
