"""Scores and rankings as vLLM, Jina and Cohere write them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from nybble.engine import RequestOutput
from nybble.server.api.generation import Usage
from nybble.server.api.scoring import Scores
from nybble.server.api.scoring_schema import RerankRequest, ScoreRequest


class ScoreFormatter:
    """See :class:`nybble.server.api.respond.WholeFormatter`."""

    def __init__(self, body: ScoreRequest, scores: Scores) -> None:
        self._model = body.model
        self._scores = scores
        self._created = int(time.time())

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._scores.group.id,
            "object": "list",
            "created": self._created,
            "model": self._model,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(self._scores.read(outputs))
            ],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "total_tokens": usage.prompt_tokens,
            },
        }


class RerankFormatter:
    """Of Jina and vLLM, or of Cohere's second version, which returns no documents."""

    def __init__(self, body: RerankRequest, scores: Scores, *, cohere: bool) -> None:
        self._body = body
        self._scores = scores
        self._cohere = cohere

    def whole(self, outputs: Sequence[Sequence[RequestOutput]], usage: Usage) -> dict[str, Any]:
        body = self._body
        ranked = sorted(enumerate(self._scores.read(outputs)), key=lambda item: -item[1])
        results = [
            {"index": index, "relevance_score": score} for index, score in ranked[: body.top_n]
        ]
        with_documents = body.return_documents
        if with_documents or (with_documents is None and not self._cohere):
            for result, (index, _) in zip(results, ranked, strict=False):
                result["document"] = {"text": body.documents[index]}  # type: ignore[assignment]
        if self._cohere:
            billed = {"search_units": 1}
            meta = {"api_version": {"version": "2"}, "billed_units": billed}
            return {"id": self._scores.group.id, "results": results, "meta": meta}
        return {
            "id": self._scores.group.id,
            "object": "list",
            "model": body.model,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "total_tokens": usage.prompt_tokens,
            },
            "results": results,
        }
