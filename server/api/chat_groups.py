"""From a chat's body to the sequences that answer it: its prompt, its guide, its limits."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

from nybble.engine import BudgetGuide, Engine, Guide, SamplingParams, Tokens
from nybble.server.api.answer_form import AnswerForm
from nybble.server.api.call import Call
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.compile_pool import CompilePool
from nybble.server.api.generation import SequenceGroup
from nybble.server.api.guiding import guide_of
from nybble.server.api.output.dialect import Dialects
from nybble.server.api.prompts import OwnTemplates
from nybble.server.api.schema import NO_LIMIT
from nybble.server.api.texts import Texts
from nybble.server.api.tools import tools_of
from nybble.server.http.errors import ApiError


class ChatGroups:
    """Makes the sequences of chats, whichever endpoint they come from."""

    def __init__(
        self,
        engine: Engine,
        texts: Texts,
        compiling: CompilePool,
        dialects: Dialects,
    ) -> None:
        """dialects: how reasoning and tool calls are written."""
        self._engine = engine
        self._texts = texts
        self._compiling = compiling
        self._dialects = dialects

    async def group(
        self,
        prefix: str,
        body: ChatRequest,
        adapter: str | None,
        call: Call,
        *,
        cut_to_room: bool = False,
    ) -> tuple[SequenceGroup, AnswerForm]:
        """The sequences that answer a chat, and how they are read. Raises ApiError 400 and
        ParameterError.

        prefix: of the id of the answer.
        cut_to_room: a limit of tokens for which there is no room behind the prompt is no error but
            none: the answer may go on to the end of the context.
        """
        tokens = self._engine.tokens_of(adapter)
        params = body.sampling_params(
            max_tokens=body.limit,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            defaults=self._engine.defaults_for(adapter),
        )
        token_ids, form = await self.prompt(body, adapter, tokens)
        params = replace(params, shown_special_tokens=form.shown_special_tokens)
        token_ids = body.truncated(token_ids, room_for(self._engine, params))
        room = self._engine.max_model_len - len(token_ids)
        if cut_to_room and params.max_tokens is not None and params.max_tokens > room:
            params = replace(params, max_tokens=None)
        self._engine.check(token_ids, params, tokens)
        guide = self._limited(
            body,
            form,
            await guide_of(
                self._texts.of(tokens).grammars,
                self._compiling,
                body,
                call.record,
                body.response_format,
                form,
            ),
            tokens,
        )
        group = SequenceGroup(
            f"{prefix}{uuid4().hex}",
            (token_ids,),
            params,
            tokens,
            guide,
            adapter,
            call.tenant,
            body.timeout,
            body.priority or 0,
            body.cache_salt or "",
            prediction=await self._predicted(body, tokens),
        )
        return group, form

    async def prompt(
        self, body: ChatRequest, adapter: str | None, tokens: Tokens
    ) -> tuple[tuple[int, ...], AnswerForm]:
        """The token ids of a chat's prompt, and how it is answered. tokens: of the adapter."""
        own, text = OwnTemplates.of(adapter, self._engine), self._texts.of(tokens)
        dialect = self._dialects.of(text.prompts.template(body, own, tools=bool(body.tools)))
        tools = tools_of(body, dialect, text.markers, body.model)
        prompt = await text.prompts.chat(
            body.messages,
            body,
            own,
            tools=None if tools is None else tools.shown(),
            any_length=body.truncate_prompt_tokens is not None,
            parse_special=bool(body.parse_special),
        )
        form = AnswerForm(
            dialect,
            text.markers,
            tools,
            prompt.text,
            continued=bool(body.continue_final_message),
            split=body.splits_reasoning,
        )
        return prompt.token_ids, form

    def _limited(
        self, body: ChatRequest, form: AnswerForm, guide: Guide | None, tokens: Tokens
    ) -> Guide | None:
        """``guide``, and the end of reasoning that has had its tokens, if the request limits it."""
        budget = body.thinking_token_budget
        if budget is None or budget == NO_LIMIT:
            return guide
        if not form.dialect.reasons:
            raise ApiError(
                400,
                f"thinking_token_budget is {budget}, but the model's chat template shows no format "
                "of reasoning: start the server with --reasoning-parser if it has one",
                param="thinking_token_budget",
                code="unsupported_parameter",
            )
        limit = form.limit(budget, self._texts.of(tokens).prompts.markers)
        return BudgetGuide(limit, tokens.vocabulary, tokens.rows, guide)

    async def _predicted(self, body: ChatRequest, tokens: Tokens) -> tuple[int, ...] | None:
        """The tokens of the answer that the client expects; none if they are not drafted."""
        if body.prediction is None:
            return None
        if self._engine.draft_method != "ngram":
            return ()
        return await self._texts.of(tokens).prompts.encode(
            body.prediction.text, special_tokens=False, any_length=True
        )


def room_for(engine: Engine, params: SamplingParams) -> int:
    """The longest prompt, in tokens, that leaves room for the requested output."""
    least = 1 if params.max_tokens is None else params.max_tokens
    return engine.max_model_len - least
