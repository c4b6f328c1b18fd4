"""The model names a request may use: those of the base model and of loaded adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nybble.engine import AdapterInfo, AdapterMixture, Engine
from nybble.server.adapters.owners import AdapterOwners
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant

ADAPTER_HEADER = "X-LoRA-Adapter"
_NAMES_IN_ERRORS = 20


class ModelNames:
    """Resolves model names. ``base`` are the names of the base model, its own first."""

    def __init__(self, engine: Engine, base: tuple[str, ...], owners: AdapterOwners) -> None:
        self._engine = engine
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
        """OpenAI's model object for a name. Raises ApiError 404."""
        self.require(name, tenant)
        info = None if name in self._base else self._engine.adapter(name)
        return self._model(name) if info is None else self._adapter(info)

    def require(self, name: str, tenant: Tenant | None) -> None:
        """Raises ApiError 404 for a name that is unknown or that the tenant may not use."""
        if name in self._base:
            known = tenant is None or tenant.may_use_model(name)
        else:
            known = self._has_adapter(name, tenant)
        if not known:
            raise self._unknown(name, "model", tenant)

    def adapter(
        self,
        model: str,
        field: str | Mapping[str, float] | None,
        headers: Mapping[str, str],
        tenant: Tenant | None,
    ) -> str | None:
        """The adapter that the model's name, the field or the header asks for; None for the base.

        field: a name, or a mixture: the weights of several adapters.

        Raises ApiError if a name is unknown, or if they ask for different adapters.
        """
        self.require(model, tenant)
        if isinstance(field, Mapping):
            for name in field:
                if not self._has_adapter(name, tenant):
                    raise self._unknown(name, "adapter", tenant)
            field = AdapterMixture(field)
        asked = {
            "model": None if model in self._base else model,
            "adapter": field,
            ADAPTER_HEADER: headers.get(ADAPTER_HEADER),
        }
        chosen = {param: name for param, name in asked.items() if name is not None}
        for param, name in chosen.items():
            if not isinstance(name, AdapterMixture) and not self._has_adapter(name, tenant):
                raise self._unknown(name, param, tenant)
        if len(set(chosen.values())) > 1:
            raise ApiError(
                400,
                "different adapters are named: "
                + ", ".join(f"{param} {name!r}" for param, name in chosen.items()),
                param=list(chosen)[-1],
                code="invalid_value",
            )
        return next(iter(chosen.values()), None)

    def _has_adapter(self, name: str, tenant: Tenant | None) -> bool:
        return self._owners.may_use(tenant, name) and self._engine.adapter(name) is not None

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
