"""Whose files, batches and jobs a request makes and sees.

A tenant sees only its own. Without admin keys, a request without a tenant is the operator's, who
sees everything. With admin keys, that is who has one; the API keys of no tenant then have files of
their own in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from nybble.server.http.errors import ApiError
from nybble.server.http.paths import matched_path
from nybble.server.tenancy.keys import Keys, bearer
from nybble.server.tenancy.tenants import TENANT, Tenant

OPERATOR = ""  # owns what was made without a tenant
_KEY_HOLDERS = "(API keys)"  # owns what was made with an API key of no tenant


def takes_admin_key(request: web.Request) -> bool:
    """Whether an admin key opens the request's path, on which :class:`Access` looks at it."""
    path = matched_path(request)
    return (
        path in ("/v1/files", "/v1/batches")
        or path.startswith(("/v1/files/", "/v1/batches/", "/v1/fine_tuning/"))
        or request.method == "DELETE"
    )


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    owner: of what the request makes.
    sees: the owner of what it sees; None for all owners.
    why_not: the refusal if it may not fine-tune.
    """

    tenant: Tenant | None
    owner: str
    sees: str | None
    why_not: ApiError | None = None

    def require_fine_tuning(self) -> None:
        """Raises ApiError 401 or 403."""
        if self.why_not is not None:
            raise self.why_not


class Access:
    def __init__(self, admin_keys: Keys) -> None:
        self._admin_keys = admin_keys

    def caller(self, request: web.Request) -> Caller:
        tenant, key = request.get(TENANT), bearer(request)
        if tenant is not None:
            refused = None if tenant.fine_tuning else _not_allowed(tenant)
            return Caller(tenant, tenant.name, tenant.name, refused)
        if not self._admin_keys or (key is not None and self._admin_keys.hold(key)):
            return Caller(None, OPERATOR, None)
        return Caller(None, _KEY_HOLDERS, _KEY_HOLDERS, self._admin_keys.refusal())

    def trainer(self, request: web.Request) -> Caller:
        """A caller who may fine-tune. Raises ApiError 401 or 403."""
        caller = self.caller(request)
        caller.require_fine_tuning()
        return caller


def is_tenants(owner: str) -> bool:
    """Whether an owner is a tenant, by its name."""
    return owner not in (OPERATOR, _KEY_HOLDERS)


def _not_allowed(tenant: Tenant) -> ApiError:
    return ApiError(
        403,
        f"tenant {tenant.name!r} may not fine-tune: its entry needs fine_tuning = true",
        code="fine_tuning_not_allowed",
    )
