"""Turns a request's constraints on its output into a guide for the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nybble.engine import GrammarCompiler, GrammarGuide
from nybble.engine.json_schema import Omission
from nybble.server.api.answer_form import AnswerForm
from nybble.server.api.compile_pool import CompilePool
from nybble.server.api.format_schema import ResponseFormat, StructuredOutputs
from nybble.server.api.schema import Sampling
from nybble.server.api.structural_tag import tags_of
from nybble.server.api.tools import Answer, AnswerError
from nybble.server.http.errors import ApiError
from nybble.server.observability.request_record import RequestRecord

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


async def guide_of(
    compiler: GrammarCompiler,
    pool: CompilePool,
    body: Sampling,
    record: RequestRecord,
    response_format: ResponseFormat | None = None,
    form: AnswerForm | None = None,
) -> GrammarGuide | None:
    """The guide a request asks for, or None. It is compiled in ``pool`` before admission.

    form: of a chat's answers. What is guided begins after their reasoning.

    If a schema is not ``strict``, the keywords which no grammar can enforce are left to the model,
    as OpenAI does, and noted in ``record``. Tools can be combined with a response format: calls
    follow the tools' grammar, and an answer that calls no tool follows the format.

    Raises ApiError 400 naming the parameter if constraints exclude each other, or if one cannot be
    compiled or takes too long; ApiError 503 if the pool is busy.
    """
    omissions: list[Omission] = []
    tools = None if form is None else form.tools
    calling = compiler
    if form is not None:
        calling = compiler.after(form.lead(calls=True))
        compiler = compiler.after(form.lead(calls=False))
    answer = _answer(response_format)
    asked: dict[str, Callable[[], GrammarGuide | None]] = {}
    if tools is None and answer is not None:
        asked["response_format"] = lambda: compiler.json_schema(
            answer.schema, None if answer.strict else omissions
        )
    if response_format is not None and (tag := response_format.structural_tag) is not None:
        asked["response_format"] = lambda: compiler.structural_tags(tags_of(tag))
    asked |= _always_enforced(compiler, body)
    if tools is not None:
        asked["tools"] = lambda: tools.guide(calling, omissions, answer)
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(asked)
        raise ApiError(
            400, f"{names} exclude each other", param=list(asked)[1], code="invalid_value"
        )
    ((param, compile),) = asked.items()
    try:
        guide = await pool.run(compile, param)
    except ValueError as error:
        if isinstance(error, AnswerError):
            param = "response_format"
        raise ApiError(
            400, f"{param} cannot be compiled: {error}", param=param, code="invalid_value"
        ) from None
    if guide is not None:
        guide.parameter = param
    record.not_enforced += omissions
    return guide


def _answer(response_format: ResponseFormat | None) -> Answer | None:
    if response_format is None or response_format.type in ("text", "structural_tag"):
        return None
    wanted = response_format.json_schema
    if wanted is None:
        return Answer(response_format.definition or _ANY_OBJECT, strict=False)
    if wanted.definition is None:
        return Answer(_ANY_OBJECT, strict=False)
    return Answer(wanted.definition, strict=wanted.strict is True)


def _always_enforced(
    compiler: GrammarCompiler, body: Sampling
) -> dict[str, Callable[[], GrammarGuide | None]]:
    asked: dict[str, Callable[[], GrammarGuide | None]] = {}
    kinds: dict[str, Callable[[Any], GrammarGuide]] = {
        "guided_json": compiler.json_schema,
        "json_schema": compiler.json_schema,
        "guided_regex": compiler.regex,
        "regex": compiler.regex,
        "guided_choice": compiler.choice,
        "guided_grammar": compiler.grammar,
        "grammar": compiler.grammar,
        "ebnf": compiler.grammar,
    }
    for name, kind in kinds.items():
        if (given := getattr(body, name)) is not None:
            asked[name] = partial(kind, given)
    if (structured := body.structured_outputs) is not None and structured.given:
        asked["structured_outputs"] = lambda: _structured(compiler, structured)
    return asked


def _structured(compiler: GrammarCompiler, asked: StructuredOutputs) -> GrammarGuide:
    if asked.json_schema is not None:
        return compiler.json_schema(asked.json_schema)
    if asked.regex is not None:
        return compiler.regex(asked.regex)
    if asked.choice is not None:
        return compiler.choice(asked.choice)
    if asked.grammar is not None:
        return compiler.grammar(asked.grammar)
    if asked.structural_tag is not None:
        return compiler.structural_tags(tags_of(asked.structural_tag))
    return compiler.json_schema(_ANY_OBJECT)
