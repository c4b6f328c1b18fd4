"""What a request may call a model: the base's names, and those of loaded adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nybble.engine import AdapterInfo, Engine
from nybble.server.errors import ApiError

ADAPTER_HEADER = "X-LoRA-Adapter"
_NAMES_IN_ERRORS = 20


class ModelNames:
    """The base answers to every name in ``base``; each adapter to its own."""

    def __init__(self, engine: Engine, base: tuple[str, ...]) -> None:
        self._engine = engine
        self._base = base
        self._created = int(time.time())

    def bodies(self) -> list[dict[str, Any]]:
        """Every name as OpenAI's model object."""
        adapters = [self._adapter(info) for info in self._engine.adapters()]
        return [self._model(name) for name in self._base] + adapters

    def body(self, name: str) -> dict[str, Any]:
        """Raises ApiError 404."""
        self.require(name)
        info = None if name in self._base else self._engine.adapter(name)
        return self._model(name) if info is None else self._adapter(info)

    def require(self, name: str) -> None:
        """Raises ApiError 404 for a name that leads nowhere."""
        if name not in self._base and self._engine.adapter(name) is None:
            raise self._unknown(name, "model")

    def adapter(self, model: str, field: str | None, headers: Mapping[str, str]) -> str | None:
        """The adapter that the model's name, the field or the header asks for; None for the base.

        Raises ApiError where a name leads nowhere or they ask for different ones.
        """
        self.require(model)
        asked = {
            "model": None if model in self._base else model,
            "adapter": field,
            ADAPTER_HEADER: headers.get(ADAPTER_HEADER),
        }
        chosen = {param: name for param, name in asked.items() if name is not None}
        for param, name in chosen.items():
            if self._engine.adapter(name) is None:
                raise self._unknown(name, param)
        if len(set(chosen.values())) > 1:
            raise ApiError(
                400,
                "different adapters are named: "
                + ", ".join(f"{param} {name!r}" for param, name in chosen.items()),
                param=list(chosen)[-1],
                code="invalid_value",
            )
        return next(iter(chosen.values()), None)

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "nybble",
            "max_model_len": self._engine.max_model_len,
        }

    def _adapter(self, info: AdapterInfo) -> dict[str, Any]:
        return self._model(info.name) | {"created": info.loaded, "parent": self._base[0]}

    def _unknown(self, name: str, param: str) -> ApiError:
        adapters = [info.name for info in self._engine.adapters()]
        kind, known = "adapter", adapters
        if param == "model":
            kind, known = "model", [*self._base, *adapters]
        names = ", ".join(known[:_NAMES_IN_ERRORS]) or "none"
        if len(known) > _NAMES_IN_ERRORS:
            names += f" and {len(known) - _NAMES_IN_ERRORS} more"
        return ApiError(
            404,
            f"the {kind} {name!r} does not exist; this server has {names}",
            param=param,
            code="model_not_found",
        )
