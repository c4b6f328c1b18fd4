"""The README's tables name every field of OpenAI's requests, and say what the server makes of it.

The tables are generated: run this file (``.venv/bin/python tests/server/api/test_field_table.py``)
after a change of the request models or of the vendored schema.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import nybble.server.api
from nybble.server.api.body import Body
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.embeddings import EmbeddingRequest
from nybble.server.api.parse import parse_body
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest
from nybble.server.http.errors import ApiError

README = Path(nybble.server.api.__path__[0]) / "README.md"
SCHEMAS = Path(__file__).parent / "openai_schema" / "schemas.json"
FIELDS: dict[str, list[str]] = json.loads(SCHEMAS.read_text())["request_fields"]
ENDPOINTS: dict[str, tuple[str, type[Body]]] = {
    "/v1/chat/completions": ("CreateChatCompletionRequest", ChatRequest),
    "/v1/completions": ("CreateCompletionRequest", CompletionRequest),
    "/v1/responses": ("CreateResponse", ResponsesRequest),
    "/v1/embeddings": ("CreateEmbeddingRequest", EmbeddingRequest),
}
BEGIN, END = "<!-- fields: {} -->", "<!-- end -->"

TEMPERATURE = "0 to 100 (0 to 2 in OpenAI's API)"
CONSTRAINTS = "json, json_object, regex, choice, grammar or structural_tag"
PRIORITY = "among a tenant's waiting requests, the one with the lowest number is next"
TRUNCATION = "-1: as many as leave room for the output"
NO_LIMIT = "-1: no limit but the context length"

# Notes on supported fields, most of them on values which are not supported.
LIMITS = {
    (ChatRequest, "messages"): "text only: images and audio are refused",
    (ChatRequest, "modalities"): "text only",
    (ChatRequest, "chat_template"): "with `--trust-request-chat-template`",
    (ChatRequest, "echo"): "the answer begins with the assistant's last message",
    (ChatRequest, "max_completion_tokens"): NO_LIMIT,
    (ChatRequest, "max_tokens"): NO_LIMIT,
    (ChatRequest, "reasoning_effort"): "only `none`, unless the chat template reads "
    "`reasoning_effort`, `enable_thinking` or `thinking`",
    (ChatRequest, "thinking_token_budget"): "-1: no limit",
    (ChatRequest, "include_reasoning"): "false: reasoning is left out",
    (ResponsesRequest, "store"): "with `--response-store`",
    (ResponsesRequest, "previous_response_id"): "with `--response-store`",
    (ResponsesRequest, "background"): "with `--response-store`, and without stream",
    (ChatRequest, "temperature"): TEMPERATURE,
    (CompletionRequest, "temperature"): TEMPERATURE,
    (ResponsesRequest, "temperature"): TEMPERATURE,
    (ResponsesRequest, "reasoning"): "effort: see `reasoning_effort` of chat completions",
    (ResponsesRequest, "priority"): PRIORITY,
    (CompletionRequest, "max_tokens"): NO_LIMIT,
    (ChatRequest, "structured_outputs"): CONSTRAINTS,
    (CompletionRequest, "structured_outputs"): CONSTRAINTS,
    (ChatRequest, "priority"): PRIORITY,
    (CompletionRequest, "priority"): PRIORITY,
    (EmbeddingRequest, "priority"): PRIORITY,
    (ChatRequest, "truncate_prompt_tokens"): TRUNCATION,
    (CompletionRequest, "truncate_prompt_tokens"): TRUNCATION,
    (EmbeddingRequest, "truncate_prompt_tokens"): TRUNCATION,
    (ChatRequest, "n"): "up to 128, and no more than the server accepts at once",
    (ChatRequest, "stop"): "up to 16",
    (ChatRequest, "tools"): "functions",
    (CompletionRequest, "best_of"): "equal to n, or 1",
    (CompletionRequest, "logprobs"): "up to 20",
    (CompletionRequest, "n"): "up to 128, and no more than the server accepts at once",
    (CompletionRequest, "stop"): "up to 16",
    (EmbeddingRequest, "normalize"): "only true",
    (EmbeddingRequest, "dimensions"): "only the model's own number",
    (ResponsesRequest, "include"): "`message.output_text.logprobs`; the rest belongs to items that "
    "there are not",
    (ResponsesRequest, "top_logprobs"): "up to 20; asks for log probabilities by itself too",
    (ResponsesRequest, "input"): "text, function calls and their outputs, reasoning",
    (ResponsesRequest, "tools"): "functions",
    (ResponsesRequest, "truncation"): "only `disabled`",
}


def table(path: str) -> str:
    name, kind = ENDPOINTS[path]
    openai = set(FIELDS[name])
    lines = ["| field | | |", "| --- | --- | --- |"]
    for field in sorted(openai | set(kind.model_fields) | set(kind.refused) | set(kind.ignored)):
        if field in kind.refused:
            state, note = "refused", kind.refused[field]
        elif field in kind.ignored:
            state, note = "ignored", kind.ignored[field]
        elif field in kind.model_fields:
            state, note = "supported", LIMITS.get((kind, field), "")
        else:
            state, note = "refused as unknown", ""
        if field not in openai:
            state += ", an extension"
        lines.append(f"| `{field}` | {state} | {note} |".replace("  ", " "))
    return "\n".join(lines)


def in_readme(path: str) -> tuple[int, int]:
    """Where the table of an endpoint lies in the README."""
    text = README.read_text()
    start = text.index(BEGIN.format(path)) + len(BEGIN.format(path))
    return start, text.index(END, start)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_table_of_fields_is_what_the_code_does(path: str) -> None:
    start, end = in_readme(path)
    assert README.read_text()[start:end].strip() == table(path), "run this file to write it anew"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_of_openais_document_is_known_by_name(path: str) -> None:
    name, kind = ENDPOINTS[path]
    assert set(FIELDS[name]) <= set(kind.model_fields) | set(kind.refused) | set(kind.ignored)
    assert not set(kind.ignored) & set(kind.refused)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_refused_is_refused_for_the_reason_in_the_table(path: str) -> None:
    kind = ENDPOINTS[path][1]
    for field, why in kind.refused.items():
        with pytest.raises(ApiError, match=re.escape(why)) as caught:
            parse_body(json.dumps({field: ["x"]}).encode(), kind)
        assert caught.value.code == "unsupported_parameter"


def main() -> None:
    for path in ENDPOINTS:
        start, end = in_readme(path)
        text = README.read_text()
        README.write_text(f"{text[:start]}\n{table(path)}\n{text[end:]}")


if __name__ == "__main__":
    main()
