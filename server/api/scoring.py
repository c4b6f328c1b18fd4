"""How relevant a document is to a query, by whichever way the model has.

A classifier (``…ForSequenceClassification``) reads both texts as its tokenizer joins a pair. The
score is the sigmoid of its logit, or of two labels the probability of the second. A model of
embeddings compares those of both texts by their cosine. Any other model with a chat template
judges: it is asked in the words of Qwen3-Reranker whether the document meets the requirements, and
the score is the probability of "yes" among "yes" and "no" (Zhang et al. 2025, Qwen3 Embedding). It
does not reason: if its template always opens reasoning, that is closed at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import numpy as np

from nybble.engine import Engine, Pooling, RequestOutput, SamplingParams, Tokens
from nybble.server.api.call import Call
from nybble.server.api.chat_groups import ChatGroups
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.generation import SequenceGroup
from nybble.server.api.parameter_names import parameters_called
from nybble.server.api.prompts import Prompts
from nybble.server.api.scoring_schema import RerankRequest, ScoreRequest
from nybble.server.api.texts import Texts
from nybble.server.http.errors import ApiError

Outputs = Sequence[Sequence[RequestOutput]]
Pair = tuple[str, str]  # a query and a document
Encode = Callable[[Sequence[Pair]], Awaitable[list[tuple[int, ...]]]]  # the tokens of each

_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Scores:
    """How the scores of pairs are read from a group's outputs.

    read: from all outputs of every sequence to one score for each pair.
    """

    group: SequenceGroup
    read: Callable[[Outputs], list[float]]


@dataclass(frozen=True)
class Asked:
    """A request for the scores of pairs.

    adapter: its adapter's name; None for the base model.
    tokens: of the adapter.
    began: when it came, by the monotonic clock.
    """

    body: RerankRequest | ScoreRequest
    adapter: str | None
    tokens: Tokens
    call: Call
    began: float = field(default_factory=time.monotonic)

    @property
    def time_left(self) -> float | None:
        """Seconds until its timeout; None if it has none."""
        timeout = self.body.timeout
        return None if timeout is None else max(0.0, self.began + timeout - time.monotonic())


class Scoring:
    def __init__(self, engine: Engine, texts: Texts, chats: ChatGroups) -> None:
        self._engine = engine
        self._texts = texts
        self._chats = chats

    async def scores(self, pairs: Sequence[Pair], asked: Asked) -> Scores:
        """The sequences that score pairs.

        Raises ParameterError, and ApiError 400, or 504 if the request's timeout passes before its
        texts are read.
        """
        try:
            async with asyncio.timeout(asked.time_left):
                return await self._scores(pairs, asked)
        except TimeoutError:
            raise ApiError(504, "the request's timeout has passed", code="timeout") from None

    async def _scores(self, pairs: Sequence[Pair], asked: Asked) -> Scores:
        body = asked.body
        classifies, embeds = bool(self._engine.num_labels), self._engine.embedding.made_for
        if body.instruction is not None and (classifies or embeds):
            raise _unsupported("instruction", "instruction is for models that judge by yes and no")
        if body.use_activation is False and self._engine.num_labels != 1:
            raise _unsupported(
                "use_activation", "only the logit of a classifier with one label can be asked for"
            )
        with parameters_called({"prompt": "documents", "messages": "documents"}):
            if isinstance(body, RerankRequest) and (most := body.max_tokens_per_doc) is not None:
                documents = [document for _, document in pairs]
                documents = await self._prompts(asked).cut(documents, [most] * len(pairs))
                pairs = [(query, cut) for (query, _), cut in zip(pairs, documents, strict=True)]
            if classifies:
                return await self._classified(pairs, asked)
            if embeds:
                return await self._compared(pairs, asked)
            return await self._judged(pairs, asked)

    async def _classified(self, pairs: Sequence[Pair], asked: Asked) -> Scores:
        labels, as_logits = self._engine.num_labels, asked.body.use_activation is False
        if labels > 2:
            raise _unsupported("model", f"this model tells {labels} labels apart, expected 1 or 2")
        prompts = await self._fitting(pairs, asked, self._prompts(asked).encode_pairs)
        group = self._group(prompts, asked, "score")

        def read(outputs: Outputs) -> list[float]:
            logits = np.stack([_vector(output) for (output,) in outputs]).astype(np.float64)
            if labels == 2:
                logits = logits[:, 1:] - logits[:, :1]
            if as_logits:
                return [float(each) for each in logits[:, 0]]
            return [float(each) for each in 1 / (1 + np.exp(-logits[:, 0]))]

        return Scores(group, read)

    async def _compared(self, pairs: Sequence[Pair], asked: Asked) -> Scores:
        if self._engine.pooling is None:
            raise _unsupported(
                "model", "this model makes embeddings in a way that is not supported"
            )
        prompts = self._engine.embedding.prompts if isinstance(asked.body, RerankRequest) else {}
        before = prompts.get("query", ""), prompts.get("document", prompts.get("passage", ""))
        # The same text has the same embedding: a query is computed once.
        texts = {(role, text): None for pair in pairs for role, text in enumerate(pair)}

        async def encode(some: Sequence[Pair]) -> list[tuple[int, ...]]:
            return await self._prompts(asked).encode_each([text for _, text in some])

        each = [("", before[role] + text) for role, text in texts]
        encoded = await self._fitting(each, asked, encode)
        numbers = {key: number for number, key in enumerate(texts)}
        group = self._group(encoded, asked, self._engine.pooling)

        def read(outputs: Outputs) -> list[float]:
            vectors = [_vector(output) for (output,) in outputs]
            return [
                float(vectors[numbers[0, first]] @ vectors[numbers[1, second]])
                for first, second in pairs
            ]

        return Scores(group, read)

    async def _judged(self, pairs: Sequence[Pair], asked: Asked) -> Scores:
        prompts = self._prompts(asked)
        markers = prompts.markers
        answers = [markers(word) for word in ("yes", "no")]
        if any(len(answer) != 1 for answer in answers):
            raise _unsupported(
                "model", "this model has no tokens for yes and no, by which a model judges"
            )
        yes, no = (answer[0] for answer in answers)

        async def judging(query: str, document: str) -> tuple[int, ...]:
            instruction = asked.body.instruction or _INSTRUCTION
            told = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
            chat = ChatRequest.model_validate(
                {
                    "model": asked.body.model,
                    "messages": [
                        {"role": "system", "content": _SYSTEM},
                        {"role": "user", "content": told},
                    ],
                    "chat_template_kwargs": {"enable_thinking": False},
                    "truncate_prompt_tokens": None,
                }
            )
            token_ids, form = await self._chats.prompt(chat, asked.adapter, asked.tokens)
            return token_ids + markers(form.without_reasoning)

        async def encode(some: Sequence[Pair]) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = []
            for pair in some:
                found.append(await judging(*pair))
                prompts.require_few_together(found)
            return found

        params = SamplingParams(
            max_tokens=1, temperature=0, logprobs=0, logprob_token_ids=(yes, no)
        )
        group = self._group(await self._fitting(pairs, asked, encode), asked, None, params)

        def read(outputs: Outputs) -> list[float]:
            scores = []
            for output, *_ in outputs:
                (_, of_yes), (_, of_no) = output.logprobs[0].top
                scores.append(float(1 / (1 + np.exp(of_no - of_yes))))
            return scores

        return Scores(group, read)

    def _group(
        self,
        prompts: Sequence[tuple[int, ...]],
        asked: Asked,
        pooling: Pooling | None,
        params: SamplingParams | None = None,
    ) -> SequenceGroup:
        params = params or SamplingParams(max_tokens=0)
        for prompt in prompts:
            self._engine.check(prompt, params, asked.tokens)
        body = asked.body
        kind = "rerank" if isinstance(body, RerankRequest) else "score"
        return SequenceGroup(
            f"{kind}-{uuid4().hex}",
            tuple(prompts),
            params,
            asked.tokens,
            adapter=asked.adapter,
            tenant=asked.call.tenant,
            timeout=asked.time_left,
            priority=body.priority or 0,
            pooling=pooling,
            few_at_a_time=True,
        )

    def _prompts(self, asked: Asked) -> Prompts:
        return self._texts.of(asked.tokens).prompts

    async def _fitting(
        self, pairs: Sequence[Pair], asked: Asked, encode: Encode
    ) -> list[tuple[int, ...]]:
        """The tokens of pairs, whose documents are cut if the request says to how many."""
        found, most = await encode(pairs), asked.body.truncate_prompt_tokens
        if most is None:
            return found
        most = self._engine.max_model_len - 1 if most == -1 else most
        prompts, shorter = self._prompts(asked), list(pairs)
        while long := [index for index, each in enumerate(found) if len(each) > most]:
            documents = [shorter[index][1] for index in long]
            sizes = [
                len(document) - (len(found[index]) - most)
                for index, document in zip(long, await prompts.encode_each(documents), strict=True)
            ]
            if min(sizes) <= 0:
                raise ApiError(
                    400,
                    f"truncate_prompt_tokens is {most}, which leaves nothing of a document",
                    param="truncate_prompt_tokens",
                    code="invalid_value",
                )
            for index, document in zip(long, await prompts.cut(documents, sizes), strict=True):
                shorter[index] = (shorter[index][0], document)
            encoded = await encode([shorter[index] for index in long])
            for index, token_ids in zip(long, encoded, strict=True):
                found[index] = token_ids
        return found


def _vector(output: RequestOutput) -> np.ndarray[Any, np.dtype[np.float32]]:
    assert output.embedding is not None
    return output.embedding


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")
