"""Cuts the schemas of the responses this server gives out of OpenAI's published OpenAPI document.

``python vendor.py openapi.yaml > schemas.json``. What the server cannot say (images, web searches,
MCP …) is left out of the unions, so that a response of that kind would not pass; descriptions and
examples are left out everywhere.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import yaml

SOURCE = "https://github.com/openai/openai-openapi"
COMMIT = "f85dbe223d40e1a31cba812ab2d755c7e98a92a3"
# Requests of which the names of the fields are kept, to check that each is known to the server.
REQUESTS = [
    "CreateChatCompletionRequest",
    "CreateCompletionRequest",
    "CreateEmbeddingRequest",
    "CreateResponse",
]
ROOTS = [
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "CreateEmbeddingResponse",
    "ErrorResponse",
    "ListModelsResponse",
    "Model",
    "Response",
    "ResponseStreamEvent",
]
UNIONS = {
    "OutputItem": ["OutputMessage", "FunctionToolCall", "ReasoningItem"],
    "Tool": ["FunctionTool"],
    "Annotation": [],
    "InputItem": [],
    "ResponseStreamEvent": [
        "ResponseCompletedEvent",
        "ResponseContentPartAddedEvent",
        "ResponseContentPartDoneEvent",
        "ResponseCreatedEvent",
        "ResponseErrorEvent",
        "ResponseFailedEvent",
        "ResponseFunctionCallArgumentsDeltaEvent",
        "ResponseFunctionCallArgumentsDoneEvent",
        "ResponseInProgressEvent",
        "ResponseIncompleteEvent",
        "ResponseOutputItemAddedEvent",
        "ResponseOutputItemDoneEvent",
        "ResponseReasoningTextDeltaEvent",
        "ResponseReasoningTextDoneEvent",
        "ResponseTextDeltaEvent",
        "ResponseTextDoneEvent",
    ],
}
# What these list beyond strings is of no concern to a response.
OPEN = {"ModelIdsShared": {"type": "string"}, "ModelIdsResponses": {"type": "string"}}
PROSE = {"description", "example", "examples", "title", "deprecated"}


def plain(node: Any, named: bool = False) -> Any:
    """``named``: the keys of ``node`` are names of properties, not keywords."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("nullable") is True and not named:  # of OpenAPI 3.0; JSON Schema knows no such word
        rest = {key: value for key, value in node.items() if key != "nullable"}
        return {"anyOf": [plain(rest), {"type": "null"}]}
    return {
        key: plain(value, named=key == "properties" and not named)
        for key, value in node.items()
        if (key not in PROSE and not key.startswith("x-")) or named
    }


def fields(schemas: dict[str, Any], node: dict[str, Any]) -> set[str]:
    if "$ref" in node:
        return fields(schemas, schemas[node["$ref"].rsplit("/", 1)[1]])
    parts = [fields(schemas, part) for part in node.get("allOf", ())]
    return set(node.get("properties", ())).union(*parts)


def main() -> None:
    with open(sys.argv[1]) as file:
        document = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    every = document["components"]["schemas"]
    requests = {name: sorted(fields(every, every[name])) for name in REQUESTS}
    for name, members in UNIONS.items():
        (union,) = {"anyOf", "oneOf"} & every[name].keys()
        refs = [{"$ref": f"#/components/schemas/{member}"} for member in members]
        missing = [ref for ref in refs if ref not in every[name][union]]
        assert not missing, (name, missing)
        every[name] = {union: refs} if refs else {"not": {}}
    every |= OPEN
    needed: set[str] = set()
    todo = list(ROOTS)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(plain(every[name])))
    info = {"version": document["info"]["version"], "source": SOURCE, "commit": COMMIT}
    schemas = {name: plain(every[name]) for name in sorted(needed)}
    document = {
        "info": info,
        "license": "MIT, see LICENSE",
        "request_fields": requests,
        "components": {"schemas": schemas},
    }
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
