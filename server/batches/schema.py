"""The body that creates a batch, as OpenAI has it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nybble.server.api.body import Body
from nybble.server.batches.lines import Endpoint

_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class CreateBatch(Body):
    refused: ClassVar = {
        "output_expires_after": "output_expires_after is not supported: delete the files"
    }

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None

    def kept(self) -> dict[str, Any]:
        """The body without null fields, as it is stored."""
        return self.model_dump(mode="json", exclude_none=True)
