"""What all bodies of requests have in common.

A field that would change the meaning and is not supported is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError, from_json


def _document_ignored(schema: dict[str, Any], kind: type[Body]) -> None:
    for name, why in kind.ignored.items():
        schema["properties"].setdefault(name, {"description": f"ignored: {why}"})


class Body(BaseModel):
    """Strict: no coercion, no unknown fields, no infinities."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        json_schema_extra=_document_ignored,
    )

    # Fields known from OpenAI's and others' APIs that this server refuses: name → why.
    refused: ClassVar[dict[str, str]] = {}
    # Values of theirs that ask for nothing, besides null, false, 0, "", [] and {}.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Fields it takes and makes nothing of: name → why that changes nothing that is generated.
    ignored: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Fields that ask for what the server cannot do. Those that ask for nothing are left out,
        as are those that are ignored whatever is in them."""
        if not isinstance(data, dict):
            return data
        for name, why in cls.refused.items():
            if (value := data.get(name)) and value not in cls.neutral.get(name, ()):
                raise PydanticCustomError(
                    "unsupported_parameter", "{why}", {"why": why, "param": name}
                )
        dropped = cls.refused.keys() | (cls.ignored.keys() - cls.model_fields.keys())
        return {name: value for name, value in data.items() if name not in dropped}


def json_object(value: Any) -> Any:
    """An object, which may be written as text."""
    if isinstance(value, str):
        try:
            return from_json(value, allow_inf_nan=False)
        except ValueError as error:
            raise PydanticCustomError(
                "not_json", "the text is not JSON: {error}", {"error": str(error)}
            ) from None
    return value


JsonObject = Annotated[
    dict[str, Any],
    BeforeValidator(json_object, json_schema_input_type=dict[str, Any] | str),
]
