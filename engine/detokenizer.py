"""Token ids to text, one token at a time, and the stop strings in that text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence as SequenceOf

from nybble.engine.request import SamplingParams
from nybble.engine.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"
# A UTF-8 character that is not complete has this many bytes at most.
_MAX_INCOMPLETE = 3


class Detokenizer:
    """Incremental text of one sequence.

    The texts of all tokens and of ``flush`` together are what the tokenizer decodes the whole
    output to, behind its prompt. A byte that is part of no character becomes U+FFFD by itself; the
    tokenizers of Llama 2 and its kin replace the whole run of byte tokens it stands in, characters
    and all.

    Text comes out in whole characters: bytes that may yet become one are held back, and so is text
    that may be the beginning of a stop string.

    stopped_by: the stop string that was found.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt_token_ids: SequenceOf[int], params: SamplingParams
    ) -> None:
        self._vocabulary = vocabulary
        self._left_out = frozenset[int]()
        if params.skip_special_tokens:
            self._left_out = vocabulary.special - params.shown_special_tokens
        # Special tokens in a row stand as they are spelt, if the decoder may put no space between.
        self._spell = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # What it decides of the next token is whether a space comes before its text.
        self._before = next((t for t in reversed(prompt_token_ids) if self._has_text(t)), None)
        self._bytes.decode(self._last_bytes(prompt_token_ids))
        # A character which the prompt left incomplete is U+FFFD in the prompt's own text.
        self._replaced_in_prompt = bool(self._bytes.getstate()[0])
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # tokens before stop strings are looked for
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def add(self, token_id: int) -> str:
        """The text that is certain after one more token. Sets ``stopped_by`` at a stop string."""
        text = self._held + self._step(token_id)
        found = [(at, len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if self._unchecked:  # what begins here may still be completed by a token that counts
            self._unchecked -= 1
        elif found:
            self._held = ""
            self._bytes.reset()
            at, length = min(found)
            self.stopped_by = text[at : at + length]
            return text[: at + length if self._include_stop else at]
        keep = self._unsettled(text) if self._stop else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no further token can come."""
        text, self._held = self._held + self._decode(b"", final=True), ""
        return text

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._left_out and token_id in self._vocabulary.bytes_of

    def _step(self, token_id: int) -> str:
        """The whole characters that a token adds."""
        if not self._has_text(token_id):
            return ""
        before, self._before = self._before, token_id
        data = self._vocabulary.bytes_of[token_id]
        if data is not None:
            return self._decode(data)
        text = self._vocabulary.text_after(before, token_id)
        if self._spell and {before, token_id} <= self._vocabulary.added:
            text = self._vocabulary.spelling(token_id).decode()
        return self._decode(b"", final=True) + text

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        text = self._bytes.decode(data, final)
        if text and self._replaced_in_prompt:
            self._replaced_in_prompt = False
            text = text.removeprefix(_REPLACEMENT)
        return text

    def _last_bytes(self, prompt_token_ids: SequenceOf[int]) -> bytes:
        """The bytes at a prompt's end, as many as can belong to a character not complete."""
        last = b""
        for token_id in reversed(prompt_token_ids):
            if not self._has_text(token_id):
                continue
            data = self._vocabulary.bytes_of[token_id]
            if data is None or len(last) >= _MAX_INCOMPLETE:
                break
            last = data + last
        return last

    def _unsettled(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
