"""The model names a request may use: those of the base model and of loaded adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nybble.engine import AdapterInfo, AdapterMixture, Engine
from nybble.server.adapters.owners import AdapterOwners
from nybble.server.adapters.resolver import AdapterResolver
from nybble.server.api.call import Call
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant

ADAPTER_HEADER = "X-LoRA-Adapter"
_NAMES_IN_ERRORS = 20


class ModelNames:
    """Resolves model names. ``base`` are the names of the base model, its own first."""

    def __init__(
        self,
        engine: Engine,
        base: tuple[str, ...],
        owners: AdapterOwners,
        resolver: AdapterResolver | None = None,
    ) -> None:
        """resolver: looks for adapters which are not loaded; None if nothing does."""
        self._engine = engine
        self._resolver = resolver
        self._owners = owners
        self._base = base
        self._created = int(time.time())

    @property
    def first(self) -> str:
        """The base model's own name."""
        return self._base[0]

    def bodies(self, tenant: Tenant | None) -> list[dict[str, Any]]:
        """OpenAI's model object for every name that the tenant may use."""
        adapters = [self._adapter(info) for info in self._adapters(tenant)]
        return [self._model(name) for name in self._models(tenant)] + adapters

    def body(self, name: str, tenant: Tenant | None) -> dict[str, Any]:
        """OpenAI's model object for a name; of an adapter, if it is loaded. Raises ApiError 404."""
        info = None if name in self._base else self._engine.adapter(name)
        if info is not None and self._owners.may_use(tenant, name):
            return self._adapter(info)
        if name in self._models(tenant):
            return self._model(name)
        raise self._unknown(name, "model", tenant)

    def require_possible(self, name: str, tenant: Tenant | None) -> None:
        """Raises ApiError 404 for a name that no later request could use either, as far as is known
        without asking a shared place."""
        possible = name in self._base or self._engine.adapter(name) is not None
        if not possible and self._resolver is not None:
            possible = self._resolver.covers(name)
        may = tenant is None or tenant.may_use_model(name)
        if name not in self._base:
            may = self._owners.may_use(tenant, name)
        if not (possible and may):
            raise self._unknown(name, "model", tenant)

    async def require(self, name: str, call: Call) -> None:
        """Raises ApiError 404 for a name that is unknown or that the tenant may not use."""
        tenant = call.tenant
        if name in self._base:
            known = tenant is None or tenant.may_use_model(name)
        else:
            known = await self._has_adapter(name, call, "model")
        if not known:
            raise self._unknown(name, "model", tenant)

    async def adapter(
        self, model: str, field: str | Mapping[str, float] | None, call: Call
    ) -> str | None:
        """The adapter that the model's name, the field or the header asks for; None for the base.

        It is loaded if need be, and stays loaded until the request ends.

        field: a name, or a mixture: the weights of several adapters.

        Raises ApiError if a name is unknown, or if they ask for different adapters.
        """
        await self.require(model, call)
        if isinstance(field, Mapping):
            for name in field:
                if not await self._has_adapter(name, call, "adapter"):
                    raise self._unknown(name, "adapter", call.tenant)
            field = AdapterMixture(field)
        asked = {
            "model": None if model in self._base else model,
            "adapter": field,
            ADAPTER_HEADER: call.headers.get(ADAPTER_HEADER),
        }
        chosen = {param: name for param, name in asked.items() if name is not None}
        for param, name in chosen.items():
            known = param == "model" or isinstance(name, AdapterMixture)
            if not known and not await self._has_adapter(name, call, param):
                raise self._unknown(name, param, call.tenant)
        if len(set(chosen.values())) > 1:
            raise ApiError(
                400,
                "different adapters are named: "
                + ", ".join(f"{param} {name!r}" for param, name in chosen.items()),
                param=list(chosen)[-1],
                code="invalid_value",
            )
        return next(iter(chosen.values()), None)

    async def _has_adapter(self, name: str, call: Call, param: str) -> bool:
        """param: what names it."""
        if not self._owners.may_use(call.tenant, name):
            return False
        if self._resolver is None:
            return self._engine.adapter(name) is not None
        try:
            return await self._resolver.obtain(name, call.leases)
        except ApiError as error:
            raise error.about(param) from None

    def _models(self, tenant: Tenant | None) -> list[str]:
        return [name for name in self._base if tenant is None or tenant.may_use_model(name)]

    def _adapters(self, tenant: Tenant | None) -> list[AdapterInfo]:
        every = self._engine.adapters()
        return [info for info in every if self._owners.may_use(tenant, info.name)]

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "nybble",
            "root": self._base[0],
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }

    def _adapter(self, info: AdapterInfo) -> dict[str, Any]:
        return self._model(info.name) | {
            "created": info.loaded,
            "root": info.name,
            "parent": self._base[0],
        }

    def _unknown(self, name: str, param: str, tenant: Tenant | None) -> ApiError:
        kind, known = "adapter", [info.name for info in self._adapters(tenant)]
        if param == "model":
            kind, known = "model", [*self._models(tenant), *known]
        names = ", ".join(known[:_NAMES_IN_ERRORS]) or "none"
        if len(known) > _NAMES_IN_ERRORS:
            names += f" and {len(known) - _NAMES_IN_ERRORS} more"
        hint = ""
        if kind == "model" and name.rpartition("/")[2] in known:
            # Gateways in front of several providers put the provider before the model's name.
            hint = f": leave out what is before it, or add --served-model-name {name}"
        return ApiError(
            404,
            f"the {kind} {name!r} does not exist; this server has {names}{hint}",
            param=param,
            code="model_not_found",
        )
