"""The request bodies of reranking, as Jina and Cohere have them, and of vLLM's scores."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.api import foreign
from nybble.server.api.body import Body
from nybble.server.api.schema import OF_THE_SERVICE, ModelName, Priority, Timeout

_MAX_TEXTS = 2048  # as inputs of embeddings


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str


def _text(value: Any) -> Any:
    """A document's text, which Jina and Cohere also take as an object with ``text``."""
    return value["text"] if isinstance(value, dict) and [*value] == ["text"] else value


_Text = Annotated[
    str, Field(min_length=1), BeforeValidator(_text, json_schema_input_type=str | _Document)
]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=_MAX_TEXTS)]


class _Scored(Body):
    """What both have. The last group is not in the others' APIs.

    truncate_prompt_tokens: tokens of query and document together, beyond which the document is cut.
    use_activation: false for the logit of a classifier with one label.
    instruction: what a judging model is told to look for.
    """

    ignored: ClassVar[dict[str, str]] = {
        "user": OF_THE_SERVICE["user"],
        "mm_processor_kwargs": foreign.IGNORED["mm_processor_kwargs"],
        "request_id": foreign.IGNORED["request_id"],
        "rid": foreign.IGNORED["rid"],
    }

    model: ModelName = ""
    user: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    use_activation: bool | None = None
    priority: Priority | None = None

    adapter: str | None = None
    instruction: str | None = None
    timeout: Timeout | None = None


class RerankRequest(_Scored):
    """max_tokens_per_doc: to which documents are cut."""

    refused: ClassVar[dict[str, str]] = {
        "rank_fields": "rank_fields is not supported: send documents as text",
        "max_chunks_per_doc": "max_chunks_per_doc is not supported, only max_tokens_per_doc",
        "return_embeddings": "return_embeddings is not supported",
    }

    query: _Text
    documents: _Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ScoreRequest(_Scored):
    """text_1 is one text or as many as text_2 has."""

    text_1: Annotated[_Texts, BeforeValidator(_texts, json_schema_input_type=str | list[str])]
    text_2: Annotated[_Texts, BeforeValidator(_texts, json_schema_input_type=str | list[str])]

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise PydanticCustomError(
                "invalid_value",
                "expected one text, or {count} as text_2 has",
                {"count": len(self.text_2), "param": "text_1"},
            )
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        firsts = self.text_1 * len(self.text_2) if len(self.text_1) == 1 else self.text_1
        return list(zip(firsts, self.text_2, strict=True))
