"""Which adapters belong to one tenant. Others may be used by any tenant whose entry allows it."""

from __future__ import annotations

from nybble.server.tenancy.tenants import Tenant


class AdapterOwners:
    """Owners by adapter name. Changed and read from any thread, one entry at a time."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def set(self, name: str, owner: str) -> None:
        """owner: the tenant's name."""
        self._owners[name] = owner

    def forget(self, name: str) -> None:
        self._owners.pop(name, None)

    def may_use(self, tenant: Tenant | None, name: str) -> bool:
        """Whether the tenant may use an adapter; an owned one is only for its owner."""
        if tenant is None:
            return True
        owner = self._owners.get(name)
        return tenant.may_use_adapter(name) if owner is None else owner == tenant.name
