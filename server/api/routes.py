"""The HTTP API's handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from nybble import __version__
from nybble.engine import Engine, require_known_tokens
from nybble.loaders.templates import TemplateRenderer
from nybble.server.api.call import Call
from nybble.server.api.chat_groups import ChatGroups
from nybble.server.api.chat_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from nybble.server.api.compile_pool import CompilePool
from nybble.server.api.embeddings import EmbeddingRequest
from nybble.server.api.endpoints import Endpoints
from nybble.server.api.generation import Generation, SequenceTimes
from nybble.server.api.messages import MessagesFormatter
from nybble.server.api.messages_schema import CountTokensRequest, MessagesRequest
from nybble.server.api.model_names import ModelNames
from nybble.server.api.openapi import openapi_document
from nybble.server.api.output.dialect import Dialects
from nybble.server.api.parameter_names import parameters_called
from nybble.server.api.parse import read_body, read_object
from nybble.server.api.prompts import OwnTemplates, Prompts
from nybble.server.api.respond import json_response, respond, respond_whole
from nybble.server.api.response_store import ResponseStore
from nybble.server.api.responses_routes import ResponsesApi
from nybble.server.api.running import RUNNING
from nybble.server.api.schema import AbortRequest, CompletionRequest
from nybble.server.api.scoring_schema import RerankRequest, ScoreRequest
from nybble.server.api.texts import Texts
from nybble.server.http.errors import ApiError
from nybble.server.http.gate import Gate
from nybble.server.observability.metrics import Metrics
from nybble.server.tenancy.admission import Admission
from nybble.server.tenancy.limits import Limits
from nybble.server.tenancy.tenants import TENANT
from nybble.server.tenancy.usage import UsageLedger

# What /v1/messages calls the parameters of a chat.
_MESSAGES_NAMES = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
}

ModelBodyT = TypeVar("ModelBodyT", ChatRequest, CompletionRequest, EmbeddingRequest)


class Api:
    """Handlers over one engine."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        names: ModelNames,
        admission: Admission,
        gate: Gate,
        limits: Limits,
        ledger: UsageLedger,
        templates: TemplateRenderer,
        ended: Callable[[SequenceTimes], None] | None = None,
        *,
        trust_chat_templates: bool = False,
        dialects: Dialects | None = None,
        response_store: ResponseStore | None = None,
        matryoshka: bool = False,
        root_path: str = "",
    ) -> None:
        """Make the handlers; nothing is computed yet.

        response_store: where responses are kept; None if they are not.
        dialects: how reasoning and tool calls are written; by default as chat templates show.
        matryoshka: whether embeddings may be cut to any size.
        trust_chat_templates: whether requests may contain chat templates of their own.
        root_path: a proxy's ``/prefix``.
        """
        self._gate = gate
        self._engine = engine
        self._metrics = metrics
        self._names = names
        self._openapi = openapi_document(root_path)
        self.generation = Generation(engine, metrics, admission, limits, ledger, ended)
        prompts = Prompts(
            engine.tokenizer,
            names.first,
            engine.max_model_len,
            templates,
            trust_chat_templates=trust_chat_templates,
        )
        self._texts = Texts(engine, prompts)
        compiling = CompilePool()
        self._chats = ChatGroups(engine, self._texts, compiling, dialects or Dialects())
        self.endpoints = Endpoints(
            engine,
            names,
            self._texts,
            self._chats,
            compiling,
            response_store,
            matryoshka=matryoshka,
        )
        self.responses = ResponsesApi(self.endpoints, self.generation, gate, response_store)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/ping", self.health),
            web.post("/ping", self.health),
            web.post("/invocations", self.invocations),
            web.post("/abort_request", self.abort),
            web.post("/v1/requests/{id}/cancel", self.cancel),
            web.delete("/v1/requests/{id}", self.cancel),
            web.get("/metrics", self.metrics),
            web.get("/version", self.version),
            web.get("/openapi.json", self.openapi),
            web.get("/v1/models", self.list_models),
            # Model names from the Hub contain a slash.
            web.get("/v1/models/{model:.+}", self.get_model),
            web.post("/v1/chat/completions", self.chat_completions),
            web.post("/v1/completions", self.completions),
            *self.responses.routes(),
            web.post("/v1/messages", self.messages),
            web.post("/v1/messages/count_tokens", self.count_tokens),
            web.post("/v1/embeddings", self.embeddings),
            web.post("/score", self.score),
            web.post("/v1/score", self.score),
            web.post("/rerank", self.rerank),
            web.post("/v1/rerank", self.rerank),
            web.post("/v2/rerank", self.rerank_as_cohere),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    async def health(self, _: web.Request) -> web.Response:
        reason = None
        if self._gate.closed:
            reason = "the server is shutting down"
        elif not self._engine.healthy:
            failure = self._engine.failure
            reason = f"the engine has failed: {failure}" if failure else "the engine is not running"
        if reason is not None:
            raise ApiError(503, reason, code="unhealthy")
        return json_response({"status": "ok"})

    async def metrics(self, _: web.Request) -> web.Response:
        self._metrics.event_loop_tasks = len(asyncio.all_tasks())
        return web.Response(
            body=self._metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def openapi(self, _: web.Request) -> web.Response:
        return json_response(self._openapi)

    async def list_models(self, request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": self._names.bodies(request.get(TENANT))})

    async def get_model(self, request: web.Request) -> web.Response:
        return json_response(self._names.body(request.match_info["model"], request.get(TENANT)))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, ChatRequest)
        group, formatter = await self.endpoints.chat(body, Call.of(request))
        return await respond(request, self.generation, group, formatter, stream=bool(body.stream))

    async def messages(self, request: web.Request) -> web.StreamResponse:
        body, call = await read_body(request, MessagesRequest), Call.of(request)
        adapter = await self._names.adapter(body.model, body.adapter, call)
        with parameters_called(_MESSAGES_NAMES):
            chat = body.chat()
            # Clients have to name a limit, and name one that suits models with a long context.
            group, form = await self._chats.group("msg_", chat, adapter, call, cut_to_room=True)
        limited = group.params.max_tokens is not None
        formatter = MessagesFormatter(group.id, chat, form, limited=limited)
        return await respond(request, self.generation, group, formatter, stream=bool(body.stream))

    async def count_tokens(self, request: web.Request) -> web.Response:
        body, call = await read_body(request, CountTokensRequest), Call.of(request)
        adapter = await self._names.adapter(body.model, body.adapter, call)
        with parameters_called(_MESSAGES_NAMES):
            token_ids, _ = await self._chats.prompt(
                body.chat(), adapter, self._engine.tokens_of(adapter)
            )
        return json_response({"input_tokens": len(token_ids)})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, CompletionRequest)
        group, formatter = await self.endpoints.completion(body, Call.of(request))
        return await respond(request, self.generation, group, formatter, stream=bool(body.stream))

    async def invocations(self, request: web.Request) -> web.StreamResponse:
        """SageMaker's path for all of them: the body says which is meant."""
        body = await read_object(request)
        endpoints = {
            "messages": self.chat_completions,
            "prompt": self.completions,
            "input": self.embeddings,
        }
        for field, endpoint in endpoints.items():
            if field in body:
                return await endpoint(request)
        raise ApiError(
            400,
            "expected messages for a chat, prompt for a completion, or input for embeddings",
            code="missing_required_parameter",
        )

    async def abort(self, request: web.Request) -> web.Response:
        """SGLang's way to cancel a request, by its X-Request-Id or the id of its answer."""
        body = await read_body(request, AbortRequest)
        return self._cancel(request, body.rid, "rid")

    async def cancel(self, request: web.Request) -> web.Response:
        """The same, with the id in the path."""
        return self._cancel(request, request.match_info["id"], "id")

    def _cancel(self, request: web.Request, id: str, param: str) -> web.Response:
        tenant = request.get(TENANT)
        count = request.app[RUNNING].cancel(id, "" if tenant is None else tenant.name)
        if not count:
            raise ApiError(
                404,
                f"no request in progress has the id {id!r}",
                param=param,
                code="request_not_found",
            )
        return json_response({"cancelled": count})

    async def embeddings(self, request: web.Request) -> web.Response:
        body = await read_body(request, EmbeddingRequest)
        group, formatter = await self.endpoints.embedding(body, Call.of(request))
        return await respond_whole(request, self.generation, group, formatter)

    async def score(self, request: web.Request) -> web.Response:
        body = await read_body(request, ScoreRequest)
        group, formatter = await self.endpoints.score(body, Call.of(request))
        return await respond_whole(request, self.generation, group, formatter)

    async def rerank(self, request: web.Request) -> web.Response:
        return await self._ranked(request, cohere=False)

    async def rerank_as_cohere(self, request: web.Request) -> web.Response:
        return await self._ranked(request, cohere=True)

    async def _ranked(self, request: web.Request, *, cohere: bool) -> web.Response:
        body = await read_body(request, RerankRequest)
        group, formatter = await self.endpoints.rerank(body, Call.of(request), cohere=cohere)
        return await respond_whole(request, self.generation, group, formatter)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, TokenizeRequest)
        adapter = None
        if body.model is not None:
            adapter = await self._names.adapter(body.model, None, Call.of(request))
        own = OwnTemplates.of(adapter, self._engine)
        prompts = self._texts.of(self._engine.tokens_of(adapter)).prompts
        if body.messages is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None
            tokens = (await prompts.chat(body.messages, body, own, tools=tools)).token_ids
        else:
            special = body.add_special_tokens is not False
            tokens = await prompts.encode(
                body.prompt or "", special_tokens=special, any_length=True
            )
        found = {
            "count": len(tokens),
            "max_model_len": self._engine.max_model_len,
            "tokens": tokens,
            "token_strs": None,
        }
        if body.return_token_strs:
            found["token_strs"] = await prompts.token_strings(tokens)
        return json_response(found)

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, DetokenizeRequest)
        adapter = None
        if body.model is not None:
            adapter = await self._names.adapter(body.model, None, Call.of(request))
        tokens = self._engine.tokens_of(adapter)
        require_known_tokens("tokens", body.tokens, tokens.vocabulary.size)
        prompts = self._texts.of(tokens).prompts
        return json_response({"prompt": await prompts.decode(body.tokens)})
