"""Token ids to text, one token at a time, and the stop strings in that text."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from nybble.engine.request import SamplingParams

# Enough of the prompt for the decoder to know whether the first output token follows a word.
_CONTEXT_TOKENS = 8
# What a decoder writes for bytes that are no character, or none yet.
_REPLACEMENT = "\ufffd"
# How tokenizers' error, which has no type of its own, begins.
_INVALID_PREFIX = "Invalid prefix encountered"


class Detokenizer:
    """Incremental text of one sequence.

    Text comes out in whole characters: a token that ends within a UTF-8 sequence yields nothing
    until the rest arrives. Text that could be the beginning of a stop string is held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: SequenceOf[int], params: SamplingParams
    ) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        settled = len(context)
        while settled and tokenizer.decode(context[:settled]).endswith(_REPLACEMENT):
            settled -= 1
        self._skip_special_tokens = params.skip_special_tokens
        self._stream = DecodeStream(
            ids=context[:settled], skip_special_tokens=params.skip_special_tokens
        )
        # Tokens since text last came out: at first the prompt's, if it ends within a character.
        self._pending = context[settled:]
        # Of them, in the prompt's own text.
        self._shown = tokenizer.decode(
            self._pending, skip_special_tokens=params.skip_special_tokens
        )
        for token_id in self._pending:
            self._stream.step(tokenizer, token_id)
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # tokens before stop strings are looked for
        # Special tokens in a row stand as they are spelt, if the decoder may put no space between.
        self._spelt: dict[int, str] = {}
        if not (params.skip_special_tokens or params.spaces_between_special_tokens):
            added = tokenizer.get_added_tokens_decoder()
            self._spelt = {token_id: token.content for token_id, token in added.items()}
        self._after_special = False
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that is certain after one more token. Sets ``stopped`` at a stop string."""
        text = self._held + self._spell(token_id, self._step(token_id))
        if self._unchecked:
            self._unchecked -= 1
            return text
        found = [(at, len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            at, length = min(found)
            return text[: at + length if self._include_stop else at]
        keep = self._unsettled(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no further token can come."""
        text, self._held = self._held, ""
        return text

    def _spell(self, token_id: int, text: str) -> str:
        if not self._spelt:
            return text
        spelling, after = self._spelt.get(token_id), self._after_special
        self._after_special = spelling is not None
        return text if spelling is None or not after else spelling

    def _step(self, token_id: int) -> str:
        """The whole characters that a token adds."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Byte tokens (Llama 2, Mistral) are decoded as one run, and a run that is not UTF-8 has
            # no characters at all: those before are written already, what is new stands alone.
            text = self._tokenizer.decode(
                self._pending, skip_special_tokens=self._skip_special_tokens
            )
            self._stream = DecodeStream(
                ids=[token_id], skip_special_tokens=self._skip_special_tokens
            )
        if not text:
            return ""
        self._pending.clear()
        shown, self._shown = self._shown, ""
        return text.removeprefix(shown)

    def _unsettled(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
