"""From an endpoint's body to the sequences that answer it, and what writes them.

What is the same over HTTP and in a batch is here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar
from uuid import uuid4

from nybble.engine import Engine, SamplingParams, Tokens
from nybble.server.api.call import Call
from nybble.server.api.chat import ChatFormatter
from nybble.server.api.chat_groups import ChatGroups, room_for
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.compile_pool import CompilePool
from nybble.server.api.completions import CompletionFormatter
from nybble.server.api.embeddings import EmbeddingRequest, EmbeddingsFormatter
from nybble.server.api.generation import SequenceGroup
from nybble.server.api.guiding import guide_of
from nybble.server.api.logprobs import Logprobs
from nybble.server.api.model_names import ModelNames
from nybble.server.api.parameter_names import parameters_called
from nybble.server.api.response_store import ResponseStore, StoredResponse
from nybble.server.api.responses import ResponsesFormatter
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest, Prompt, Sampling
from nybble.server.api.scores import RerankFormatter, ScoreFormatter
from nybble.server.api.scoring import Asked, Scoring
from nybble.server.api.scoring_schema import RerankRequest, ScoreRequest
from nybble.server.api.texts import Texts
from nybble.server.http.errors import ApiError

# What /v1/responses calls the parameters of a chat.
_RESPONSES_NAMES = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "response_format": "text.format",
}

ModelBodyT = TypeVar(
    "ModelBodyT",
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponsesRequest,
    RerankRequest,
    ScoreRequest,
)


class Endpoints:
    """Over one engine. All methods raise ApiError and ParameterError naming the parameter."""

    def __init__(
        self,
        engine: Engine,
        names: ModelNames,
        texts: Texts,
        chats: ChatGroups,
        compiling: CompilePool,
        store: ResponseStore | None,
        *,
        matryoshka: bool = False,
    ) -> None:
        """store: where responses are kept; None if they are not. matryoshka: whether embeddings may
        be cut to any size."""
        self._engine = engine
        self._names = names
        self._texts = texts
        self._chats = chats
        self._compiling = compiling
        self._store = store
        self._matryoshka = matryoshka
        self._scoring = Scoring(engine, texts, chats)

    async def chat(self, body: ChatRequest, call: Call) -> tuple[SequenceGroup, ChatFormatter]:
        body = self._named(body)
        adapter = await self._adapter(body, call)
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        names = {"prompt": "messages", "max_tokens": limit, "logprobs": "top_logprobs"}
        with parameters_called(names):
            group, form = await self._chats.group("chatcmpl-", body, adapter, call)
        formatter = ChatFormatter(
            group.id,
            body,
            int(time.time()),
            self._logprobs(body, group),
            form,
            group.prompts,
            body.echoed,
        )
        return group, formatter

    async def completion(
        self, body: CompletionRequest, call: Call
    ) -> tuple[SequenceGroup, CompletionFormatter]:
        body = self._named(body)
        adapter = await self._adapter(body, call)
        tokens, defaults = self._engine.tokens_of(adapter), self._engine.defaults_for(adapter)
        params = body.sampling_params(body.limit, body.logprobs, defaults)
        parse_special = body.parse_special is not False  # rendered chat templates contain markers
        text = self._texts.of(tokens)
        prompts = await self._encoded(
            body, body.prompts, params, tokens, parse_special=parse_special
        )
        echoes = None
        if body.echo:
            echoes = [
                prompt if isinstance(prompt, str) else await text.prompts.decode(prompt)
                for prompt in body.prompts
            ]
        guide = await guide_of(
            text.grammars, self._compiling, body, call.record, body.response_format
        )
        group = SequenceGroup(
            f"cmpl-{uuid4().hex}",
            tuple(prompts),
            params,
            tokens,
            guide,
            adapter,
            call.tenant,
            body.timeout,
            body.priority or 0,
            body.cache_salt or "",
        )
        logprobs = self._logprobs(body, group)
        return group, CompletionFormatter(
            group.id, body, int(time.time()), logprobs, echoes, group.prompts
        )

    async def embedding(
        self, body: EmbeddingRequest, call: Call
    ) -> tuple[SequenceGroup, EmbeddingsFormatter]:
        body = self._named(body)
        adapter = await self._adapter(body, call)
        if self._engine.pooling is None:
            raise ApiError(
                400,
                f"the model {body.model!r} makes embeddings in a way that is not supported: "
                "expected the last token's or the mean in its 1_Pooling/config.json",
                param="model",
                code="unsupported_parameter",
            )
        self._require_size(body.dimensions)
        tokens = self._engine.tokens_of(adapter)
        params = SamplingParams(max_tokens=0)
        with parameters_called({"prompt": "input"}):
            prompts = await self._encoded(body, self._prompted(body), params, tokens)
        group = SequenceGroup(
            f"embd-{uuid4().hex}",
            tuple(prompts),
            params,
            tokens,
            adapter=adapter,
            tenant=call.tenant,
            timeout=body.timeout,
            priority=body.priority or 0,
            pooling=self._engine.pooling,
        )
        return group, EmbeddingsFormatter(body)

    def _require_size(self, size: int | None) -> None:
        """Raises ApiError 400 if embeddings cannot be cut to it."""
        own, sizes = self._engine.hidden_size, self._engine.embedding.sizes
        if self._matryoshka:
            sizes = "any"
        if size in (None, own) or (size < own if sizes == "any" else size in sizes):
            return
        known = ", ".join(map(str, sizes))
        cut = f"can be cut to {known}" if sizes else "were not trained to be cut short"
        if sizes == "any":
            cut = "cannot be longer"
        raise ApiError(
            400,
            f"dimensions is {size}, but this model's embeddings have {own} and {cut}",
            param="dimensions",
            code="unsupported_parameter",
        )

    def _prompted(self, body: EmbeddingRequest) -> Sequence[Prompt]:
        """The inputs with what the model's makers put before them."""
        settings = self._engine.embedding
        name = settings.default if body.prompt_name is None else body.prompt_name
        if name is None:
            return body.prompts
        if name not in settings.prompts:
            known = ", ".join(map(repr, settings.prompts)) or "none"
            raise ApiError(
                400,
                f"prompt_name is {name!r}, the model has {known}",
                param="prompt_name",
                code="invalid_value",
            )
        texts = [each for each in body.prompts if isinstance(each, str)]
        if len(texts) != len(body.prompts):
            if body.prompt_name is None:
                return body.prompts
            raise ApiError(
                400,
                "prompt_name is for texts: nothing is put before token ids",
                param="prompt_name",
                code="invalid_value",
            )
        return [settings.prompts[name] + text for text in texts]

    async def score(self, body: ScoreRequest, call: Call) -> tuple[SequenceGroup, ScoreFormatter]:
        body = self._named(body)
        asked = await self._asked(body, call)
        scores = await self._scoring.scores(body.pairs, asked)
        return scores.group, ScoreFormatter(body, scores)

    async def rerank(
        self, body: RerankRequest, call: Call, *, cohere: bool
    ) -> tuple[SequenceGroup, RerankFormatter]:
        """cohere: whether the answer has the form of Cohere's second version."""
        body = self._named(body)
        pairs = [(body.query, document) for document in body.documents]
        asked = await self._asked(body, call)
        scores = await self._scoring.scores(pairs, asked)
        return scores.group, RerankFormatter(body, scores, cohere=cohere)

    async def _asked(self, body: RerankRequest | ScoreRequest, call: Call) -> Asked:
        adapter = await self._names.adapter(body.model, body.adapter, call)
        return Asked(body, adapter, self._engine.tokens_of(adapter), call)

    async def response(
        self, body: ResponsesRequest, call: Call
    ) -> tuple[SequenceGroup, ResponsesFormatter, StoredResponse]:
        """The third is the response as it is stored before it begins."""
        body = self._named(body)
        adapter = await self._adapter(body, call)
        store = None if body.store is False else self._store
        history = await self._history(body.previous_response_id, call.owner)
        with parameters_called(_RESPONSES_NAMES):
            chat = body.chat(history)
            group, form = await self._chats.group("resp_", chat, adapter, call)
        items = [*history, *body.items()]

        def save(response: dict[str, Any]) -> None:
            if store is not None:
                store.save(StoredResponse(call.owner, response, items))

        logprobs = self._logprobs(chat, group)
        formatter = ResponsesFormatter(
            group.id, body, int(time.time()), group.params, form, logprobs, ended=save
        )
        queued = formatter.response | {"status": "queued", "output": []}
        return group, formatter, StoredResponse(call.owner, queued, items)

    async def _history(self, previous: str | None, owner: str) -> list[dict[str, Any]]:
        """The items of the conversation that is continued."""
        if previous is None:
            return []
        if self._store is None:
            raise ApiError(
                400,
                "responses are not stored here: start the server with --response-store, or send "
                "the conversation as input",
                param="previous_response_id",
                code="unsupported_parameter",
            )
        stored = await self._store.get(previous, owner)
        if stored is None:
            raise unknown_response(previous, "previous_response_id")
        if stored.response["status"] in ("queued", "in_progress"):
            raise ApiError(
                400,
                f"the response {previous!r} is not finished",
                param="previous_response_id",
                code="invalid_value",
            )
        return stored.conversation

    def _named(self, body: ModelBodyT) -> ModelBodyT:
        """The body, with the base model's name if it names none."""
        return body if body.model else body.model_copy(update={"model": self._names.first})

    async def _adapter(self, body: ModelBodyT, call: Call) -> str | None:
        return await self._names.adapter(body.model, body.adapter, call)

    def _logprobs(self, body: Sampling, group: SequenceGroup) -> Logprobs | None:
        params, tokens = group.params, group.tokens
        if params.logprobs is None and params.prompt_logprobs is None:
            return None
        ends = tokens.ends | self._engine.end_tokens(params, group.adapter, tokens)
        if params.include_stop_str_in_output:
            ends = frozenset()
        as_ids = body.return_tokens_as_token_ids is True
        return Logprobs(self._texts.of(tokens).bytes, ends, as_token_ids=as_ids)

    async def _encoded(
        self,
        body: CompletionRequest | EmbeddingRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        tokens: Tokens,
        *,
        parse_special: bool = True,
    ) -> list[tuple[int, ...]]:
        encoder = self._texts.of(tokens).prompts
        special, cut = body.add_special_tokens is not False, body.truncate_prompt_tokens is not None
        encoded = await encoder.encode_all(
            prompts, special_tokens=special, any_length=cut, parse_special=parse_special
        )
        if cut:
            # Truncation keeps the special tokens around a text; token ids have none added.
            text = isinstance(prompts[0], str) and special
            around = encoder.around if text else (0, 0)
            encoded = [
                body.truncated(each, room_for(self._engine, params), around) for each in encoded
            ]
        for prompt in encoded:
            self._engine.check(prompt, params, tokens)
        return encoded


def unknown_response(id: str, param: str) -> ApiError:
    return ApiError(
        404, f"there is no stored response {id!r}", param=param, code="response_not_found"
    )
