"""Who may upload files and train, and whose files and jobs a request sees.

A tenant may if its entry has ``fine_tuning = true``, and sees only its own. A request without a
tenant is the operator's and sees everything. If there are admin keys it must carry one.
"""

from __future__ import annotations

from aiohttp import web

from nybble.server.http.errors import ApiError
from nybble.server.http.paths import matched_path
from nybble.server.tenancy.keys import Keys
from nybble.server.tenancy.tenants import TENANT, Tenant

OPERATOR = ""  # owns what was made without a tenant


def needs_right(request: web.Request) -> bool:
    """Whether the request's path is one that :class:`Access` guards."""
    path = matched_path(request)
    return (
        path == "/v1/files"
        or path.startswith(("/v1/files/", "/v1/fine_tuning/"))
        or request.method == "DELETE"
    )


class Access:
    def __init__(self, admin_keys: Keys) -> None:
        self._admin_keys = admin_keys

    def tenant(self, request: web.Request) -> Tenant | None:
        """Raises ApiError 401 or 403."""
        tenant = request.get(TENANT)
        if tenant is None and self._admin_keys:
            self._admin_keys.require(request)
        if tenant is not None and not tenant.fine_tuning:
            raise ApiError(
                403,
                f"tenant {tenant.name!r} may not fine-tune: its entry needs fine_tuning = true",
                code="fine_tuning_not_allowed",
            )
        return tenant


def owner_of(tenant: Tenant | None) -> str:
    return OPERATOR if tenant is None else tenant.name


def visible_to(tenant: Tenant | None) -> str | None:
    """The owner whose files and jobs a tenant sees; None for all owners."""
    return None if tenant is None else tenant.name
