"""The server's OpenAPI document, made from the pydantic models that validate requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from nybble import __version__
from nybble.server.api.body import Body
from nybble.server.api.chat_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from nybble.server.api.embeddings import EmbeddingRequest
from nybble.server.api.messages_schema import CountTokensRequest, MessagesRequest
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import AbortRequest, CompletionRequest
from nybble.server.api.scoring_schema import RerankRequest, ScoreRequest

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/score": ScoreRequest,
    "/v1/score": ScoreRequest,
    "/rerank": RerankRequest,
    "/v1/rerank": RerankRequest,
    "/v2/rerank": RerankRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/abort_request": AbortRequest,
}
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_BY_NAME = {
    "/v1/models/{model}": ("get",),
    "/v1/requests/{id}": ("delete",),
    "/v1/requests/{id}/cancel": ("post",),
    "/v1/responses/{id}": ("get", "delete"),
    "/v1/responses/{id}/input_items": ("get",),
    "/v1/responses/{id}/cancel": ("post",),
}
_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"
_REF = "#/components/schemas/{model}"

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

# Of Anthropic's API.
_MESSAGES_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def openapi_document(root_path: str = "") -> dict[str, Any]:
    """OpenAPI 3.1, of the endpoints in :mod:`nybble.server.api.routes`.

    root_path: a proxy's ``/prefix``.
    """
    _, definitions = models_json_schema(
        [(body, "validation") for body in BODIES.values()], ref_template=_REF
    )
    paths: dict[str, Any] = {}
    for path, body in BODIES.items():
        answers = {_JSON: {"type": "object"}}
        if path in _STREAMED:
            answers[_EVENTS] = {"type": "string"}
        paths[path] = {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {_JSON: {"schema": {"$ref": _REF.format(model=body.__name__)}}},
                },
                "responses": _responses(
                    answers,
                    "MessagesErrorResponse" if path.startswith("/v1/messages") else "ErrorResponse",
                ),
            }
        }
    for path in ("/health", "/ping", "/version", "/v1/models", "/v1/usage", "/openapi.json"):
        paths[path] = {"get": {"responses": _responses({_JSON: {"type": "object"}})}}
    paths["/metrics"] = {"get": {"responses": _responses({_TEXT: {"type": "string"}})}}
    any_object = {"content": {_JSON: {"schema": {"type": "object"}}}}
    answered = {"responses": _responses({_JSON: {"type": "object"}})}
    paths["/ping"]["post"] = answered
    paths["/invocations"] = {"post": {"requestBody": {"required": True, **any_object}, **answered}}
    for path, methods in _BY_NAME.items():
        name = path.partition("{")[2].partition("}")[0]
        named = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        paths[path] = {method: {**answered, "parameters": [named]} for method in methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nybble", "version": __version__},
        # Relative to where the document is: scheme and host are those its reader has.
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": {
                **definitions["$defs"],
                "ErrorResponse": _ERROR,
                "MessagesErrorResponse": _MESSAGES_ERROR,
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # A key is optional: the server asks for one only if it was started with keys.
        "security": [{}, {"key": []}, {"x-api-key": []}],
    }


def _responses(
    answers: dict[str, dict[str, Any]], error_model: str = "ErrorResponse"
) -> dict[str, Any]:
    def response(about: str, content: dict[str, dict[str, Any]]) -> dict[str, Any]:
        schemas = {kind: {"schema": schema} for kind, schema in content.items()}
        return {"description": about, "content": schemas}

    error = {"$ref": _REF.format(model=error_model)}
    return {"200": response("OK", answers), "default": response("An error", {_JSON: error})}
