"""The server's own OpenAPI document is well formed, whole, and true of what it takes."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nybble.engine import Engine
from nybble.server.api.openapi import BODIES, openapi_document
from nybble.server.api.responses_routes import ResponsesApi
from nybble.server.api.routes import Api

from ..client import Client, run

DOCUMENT = openapi_document()


def validator(path: str) -> Draft202012Validator:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def test_it_is_served_and_has_every_endpoint(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/openapi.json") as response:
            assert await response.json() == DOCUMENT
        routes = {
            (resource.canonical, route.method)
            for route in client.app.router.routes()
            if (resource := route.resource) and getattr(route.handler, "__self__", None)
            if isinstance(route.handler.__self__, Api | ResponsesApi)
            and route.method in ("GET", "POST", "DELETE")
        }
        documented = {
            (path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item
        }
        assert routes | {("/v1/usage", "GET")} == documented

    run(engine, scenario)


def test_its_paths_are_below_the_prefix_of_a_proxy(engine: Engine) -> None:
    assert DOCUMENT["servers"] == [{"url": "/"}]

    async def scenario(client: Client) -> None:
        async with client.get("/openapi.json") as response:
            servers = (await response.json())["servers"]
        async with client.get(servers[0]["url"] + "/v1/models") as response:
            assert (servers, response.status) == ([{"url": "/llm"}], 200)

    run(engine, scenario, root_path="/llm")


@pytest.mark.parametrize("path", BODIES)
def test_its_schemas_are_schemas(path: str) -> None:
    Draft202012Validator.check_schema(DOCUMENT["components"]["schemas"][BODIES[path].__name__])
    assert list(validator(path).iter_errors({"unknown": 1}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "a", "stop": "b", "logit_bias": {"5": 1}}),
        ("/v1/completions", {"model": "m", "prompt": [[1, 2], [3]], "stop": ["b"]}),
        ("/v1/embeddings", {"model": "m", "input": ["a", "b"], "encoding_format": None}),
        ("/v1/responses", {"model": "m", "input": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
    ],
)
def test_what_is_taken_is_valid_by_it(path: str, body: dict[str, Any]) -> None:
    BODIES[path].model_validate(body)
    assert not list(validator(path).iter_errors(body))
    assert list(validator(path).iter_errors(body | {"unknown": 1}))
