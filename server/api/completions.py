"""Text completions as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.engine import PromptLogprobs, RequestOutput
from nybble.server.api.choices import ChoicesShape
from nybble.server.api.logprobs import Logprobs
from nybble.server.api.schema import CompletionRequest


class CompletionShape(ChoicesShape):
    """``text_completion``.

    logprobs: writes log probabilities; None if none are asked for.
    echoes: the text of each prompt, which its choices begin with; None if not asked for.
    """

    def __init__(
        self,
        id: str,
        body: CompletionRequest,
        created: int,
        logprobs: Logprobs | None,
        echoes: Sequence[str] | None,
        prompts: Sequence[tuple[int, ...]],
    ) -> None:
        super().__init__(body, prompts)
        self._head = {
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": body.model,
        }
        self._alternatives = body.logprobs
        self._prompt_alternatives = body.prompt_logprobs
        self._logprobs = logprobs
        self._echoes = echoes
        self._begun: set[int] = set()
        self._of_prompts: dict[int, PromptLogprobs] = {}
        self._offsets: dict[int, int] = {}

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choice = self._choice(index, outputs) | {"prompt_logprobs": None}
        if self._prompt_alternatives is not None and self._logprobs is not None:
            of_prompt = self._of_prompts[index // self._n]
            choice["prompt_logprobs"] = self._logprobs.by_id(of_prompt, self._prompt_alternatives)
        return choice

    def chunks(self, index: int, output: RequestOutput) -> Sequence[dict[str, Any]]:
        choice = self._choice(index, [output])
        logprobs = choice["logprobs"]
        reason, choice["finish_reason"] = choice["finish_reason"], None
        wanted = choice["text"] or (logprobs and logprobs["tokens"])
        wanted = wanted or choice.get("token_ids") or choice.get("prompt_token_ids")
        chunks = [choice] if wanted else []
        if reason is not None:  # in a chunk of its own, as OpenAI does
            end = {"index": index, "text": "", "logprobs": None, "finish_reason": reason}
            chunks.append(end | self.no_token_ids)
        return chunks

    def _choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        text = "".join(output.text for output in outputs)
        extra = self.token_ids(outputs)
        logprobs = None
        if self._logprobs is not None and self._alternatives is not None:
            logprobs = self._logprobs.completion(outputs)
        if index not in self._begun:
            self._begun.add(index)
            extra |= self.prompt_token_ids(index)
            prompt = index // self._n
            # Only a prompt's first sequence has them, and its output always comes first.
            if (found := outputs[0].prompt_logprobs) is not None:
                self._of_prompts[prompt] = found
            if self._echoes is not None:
                text = self._echoes[prompt] + text
                if logprobs is not None:
                    self._prepend(logprobs, index)
        if logprobs is not None:
            lengths = logprobs.pop("lengths")
            offset = self._offsets.get(index, 0)
            logprobs["text_offset"] = []
            for length in lengths:
                logprobs["text_offset"].append(max(0, offset))
                offset += length
            self._offsets[index] = offset
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": outputs[-1].finish_reason,
            **extra,
        }

    def _prepend(self, logprobs: dict[str, Any], index: int) -> None:
        """Put the prompt's logprobs before those of the output."""
        assert self._logprobs is not None
        assert self._alternatives is not None
        assert self._echoes is not None
        prompt = index // self._n
        echoed = self._logprobs.prompt(self._of_prompts[prompt], self._alternatives)
        # Tokens such as BOS are not part of the echoed text: count offsets back from its end.
        self._offsets[index] = len(self._echoes[prompt]) - sum(echoed["lengths"])
        for key, values in logprobs.items():
            values[:0] = echoed[key]
