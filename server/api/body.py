"""The base class of all request bodies.

A field is refused if it is not supported and would change the result.
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

    # Refused fields of OpenAI's and other servers' APIs: name → why.
    refused: ClassVar[dict[str, str]] = {}
    # Values of refused fields which are accepted because they ask for nothing, besides null,
    # false, 0, "", [] and {}.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Accepted but ignored fields: name → why ignoring is safe.
    ignored: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Refuse fields that ask for something unsupported.

        Refused fields whose value asks for nothing are dropped, and so are ignored fields.
        """
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
    """A JSON object, or the object that a string contains as JSON."""
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
