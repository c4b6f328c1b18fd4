"""The base class of all request bodies.

A field is refused if it is not supported and would change the result.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic_core import (
    CoreSchema,
    PydanticCustomError,
    PydanticKnownError,
    core_schema,
    from_json,
)


def _document_ignored(schema: dict[str, Any], kind: type[Body]) -> None:
    for name, why in kind.ignored.items():
        schema["properties"].setdefault(name, {"description": f"ignored: {why}"})


def _with_few_errors(schema: Any) -> None:
    """Make every list in a schema stop at its first wrong element, and every object of which a
    length is asked be measured before its values are."""
    inner = schema.values() if isinstance(schema, dict) else schema
    if not isinstance(schema, dict | list):
        return
    for each in list(inner):
        _with_few_errors(each)
    if isinstance(schema, dict) and schema.get("type") == "list":
        schema["fail_fast"] = True
    if isinstance(schema, dict) and schema.get("type") == "dict" and "max_length" in schema:
        check = partial(_require_few, schema["max_length"])
        measured = core_schema.no_info_before_validator_function(check, {**schema})
        schema.clear()
        schema.update(measured)


def _require_few(most: int, value: Any) -> Any:
    if isinstance(value, dict) and len(value) > most:
        found = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}
        raise PydanticKnownError("too_long", found)
    return value


class Body(BaseModel):
    """Strict: no coercion, no unknown fields, no infinities.

    A wrong body has few errors, however long it is: one is reported, and a million take a gigabyte
    and keep all of Python waiting. So a list stops at its first wrong element, and of an object's
    unknown fields one is an error.

    Unknown fields are left out if the context of the validation is a function: it is called with
    the class of the object and with each name.
    """

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

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler, /
    ) -> CoreSchema:
        schema = handler(source)
        _with_few_errors(handler.resolve_ref_schema(schema))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any, info: ValidationInfo) -> Any:
        """Refuse fields that ask for something unsupported.

        Refused fields whose value asks for nothing are dropped, and so are ignored fields.
        """
        if not isinstance(data, dict) or data.keys() <= _names(cls):
            return data
        for name, why in cls.refused.items():
            if (value := data.get(name)) and value not in cls.neutral.get(name, ()):
                raise PydanticCustomError(
                    "unsupported_parameter", "{why}", {"why": why, "param": name}
                )
        dropped = _dropped(cls)
        given = {name: value for name, value in data.items() if name not in dropped}
        if cls.model_config.get("extra") == "forbid":
            unknown = [name for name in given if name not in _names(cls)]
            for name in unknown if info.context else unknown[1:]:
                del given[name]
                if info.context:
                    info.context(cls, name)
        return given


@cache
def _names(kind: type[Body]) -> frozenset[str]:
    """The fields which an object of this kind has."""
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


@cache
def _dropped(kind: type[Body]) -> frozenset[str]:
    """The fields which it may be sent with, and has not."""
    return frozenset(kind.refused.keys() | (kind.ignored.keys() - kind.model_fields.keys()))


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
