"""The fields of a request that constrain the format of its output."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.api.body import Body, JsonObject

_MAX_CHOICES = 1024

Choices = Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES)]


class JsonSchema(Body):
    name: str | None = None  # OpenAI asks for one, llama.cpp's clients leave it out
    description: str | None = None
    # OpenAI calls this field `schema`, a name that pydantic's BaseModel uses itself.
    strict: bool | None = None  # refuse what cannot be enforced, instead of leaving it to the model
    definition: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    """structures, triggers, format: see :mod:`nybble.server.api.structural_tag`.

    definition: the field ``schema``, which llama.cpp's clients write beside ``json_object``.
    """

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")
    structures: list[Any] | None = None
    triggers: list[Any] | None = None
    format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "invalid_value",
                "json_schema is required with type json_schema, and only with it",
                {"param": "json_schema"},
            )
        if self.definition is not None and self.type != "json_object":
            raise PydanticCustomError(
                "invalid_value",
                "schema goes with type json_object; with json_schema it belongs into that field",
                {"param": "schema"},
            )
        return self

    @property
    def structural_tag(self) -> dict[str, Any] | None:
        """The structural tag, if one is asked for."""
        if self.type != "structural_tag":
            return None
        return self.model_dump(exclude={"json_schema"}, exclude_none=True)


class StructuredOutputs(Body):
    """vLLM's constraints on the output; exactly one must be given.

    structural_tag: see :mod:`nybble.server.api.structural_tag`.
    """

    ignored: ClassVar[dict[str, str]] = {"disable_fallback": "there is only one backend"}
    refused: ClassVar[dict[str, str]] = {
        "disable_any_whitespace": "disable_any_whitespace is not supported: use regex",
        "disable_additional_properties": "disable_additional_properties is not supported: write "
        "additionalProperties into the schema",
        "whitespace_pattern": "whitespace_pattern is not supported: use regex",
    }

    json_schema: JsonObject | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: JsonObject | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.given) > 1:
            raise PydanticCustomError(
                "invalid_value",
                "{names} exclude each other",
                {"names": " and ".join(self.given), "param": self.given[1]},
            )
        return self

    @property
    def given(self) -> list[str]:
        """The names of the constraints in the request."""
        found = [name for name, value in self if value is not None and value is not False]
        return ["json" if name == "json_schema" else name for name in found]
