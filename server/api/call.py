"""Who calls an endpoint, and what is recorded of it: over HTTP, or by a line of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from aiohttp import web

from nybble.server.adapters.resolver import LEASES
from nybble.server.observability.request_record import RECORD, RequestRecord
from nybble.server.tenancy.tenants import TENANT, Tenant


@dataclass(frozen=True)
class Call:
    """Who calls, and with what.

    tenant: None if the caller is none.
    headers: of the HTTP request, by their names.
    leases: holds the adapters of shared places which the call uses, until it ends.
    """

    tenant: Tenant | None
    record: RequestRecord
    headers: Mapping[str, str] = field(default_factory=dict)
    leases: ExitStack | None = None

    @classmethod
    def of(cls, request: web.Request) -> Self:
        return cls(request.get(TENANT), request[RECORD], request.headers, request.get(LEASES))

    @property
    def owner(self) -> str:
        """The tenant's name; "" without tenants."""
        return "" if self.tenant is None else self.tenant.name
