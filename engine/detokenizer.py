"""Token ids to text, one token at a time, and the stop strings in that text."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Enough of the prompt for the decoder to know whether the first output token follows a word.
_CONTEXT_TOKENS = 8


class Detokenizer:
    """Incremental text of one sequence.

    Text comes out in whole characters: a token that ends within a UTF-8 sequence yields nothing
    until the rest arrives. Text that could be the beginning of a stop string is held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: SequenceOf[int], stop: tuple[str, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(
            ids=list(prompt_token_ids[-_CONTEXT_TOKENS:]), skip_special_tokens=True
        )
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that is certain after one more token. Sets ``stopped`` at a stop string."""
        text = self._held + (self._stream.step(self._tokenizer, token_id) or "")
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._unsettled(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no further token can come."""
        text, self._held = self._held, ""
        return text

    def _unsettled(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
