"""/v1/embeddings: its request body, and vectors in OpenAI's format."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from nybble.engine import RequestOutput
from nybble.server.api import foreign
from nybble.server.api.generation import Usage
from nybble.server.api.schema import (
    OF_THE_SERVICE,
    AdapterChoice,
    ModelName,
    Priority,
    Prompt,
    PromptShapes,
    Timeout,
    Truncated,
    prompts_of,
)


class EmbeddingRequest(Truncated):
    ignored: ClassVar[dict[str, str]] = {
        "user": OF_THE_SERVICE["user"],
        "mm_processor_kwargs": foreign.IGNORED["mm_processor_kwargs"],
        "request_id": foreign.IGNORED["request_id"],
        "rid": foreign.IGNORED["rid"],
    }

    model: ModelName = ""
    input: Annotated[Any, BeforeValidator(prompts_of, json_schema_input_type=PromptShapes)]
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None

    user: str | None = None

    adapter: AdapterChoice | None = None
    normalize: Literal[True] | None = None  # from vLLM; embeddings always have length 1
    prompt_name: str | None = None  # from sentence-transformers
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None

    @property
    def prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = self.input
        return prompts


class EmbeddingsFormatter:
    """See :class:`nybble.server.api.respond.WholeFormatter`."""

    def __init__(self, body: EmbeddingRequest) -> None:
        self._model = body.model
        self._base64 = body.encoding_format == "base64"
        self._size = body.dimensions

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._vector(output)}
                for index, (output,) in enumerate(outputs)
            ],
            "model": self._model,
            "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
        }

    def _vector(self, output: RequestOutput) -> str | list[float]:
        vector = output.embedding
        assert vector is not None
        if self._size is not None and self._size < len(vector):
            vector = vector[: self._size]
            vector = vector / np.linalg.norm(vector)
        if self._base64:  # of little-endian float32
            return b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers
