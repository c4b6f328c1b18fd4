"""What the tokens of a vocabulary stand for: bytes, or text that depends on the token before."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

_WORD_START = "▁"


class Vocabulary:
    """The tokens of one tokenizer; safe from any thread.

    Two kinds of token are bytes, whatever stands beside them: all of a byte-level vocabulary
    (GPT-2, Qwen, Llama 3), and those that spell a byte in a vocabulary of words (``<0xE2>`` in
    Llama 2, Mistral and Gemma). The others are text, with a space before it or not depending on
    whether another token comes before.

    bytes_of: for each id that a token has, its bytes; None for a token which is text.
    size: one more than the highest token id. The rows of the model's output layer beyond it, which
        round its size up, stand for nothing.
    added: ids of the tokens that were added to the model's own, whole words as they are spelt.
    special: those of them that are control tokens, which a text leaves out unless asked otherwise.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._spelt = {token_id: token.content for token_id, token in added.items()}
        self.added = frozenset(added)
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        decoder = tokenizer.decoder
        kinds = set() if decoder is None else _kinds(json.loads(decoder.__getstate__()))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._word_starts = bool(kinds & {"Metaspace", "ByteFallback"})
        # All of them now: a step looks up one for each of its sequences.
        tokens = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
        tokens |= self._spelt  # which may take the id of one of the model's own
        self.size = max(tokens, default=-1) + 1
        self.bytes_of: Mapping[int, bytes | None]
        self.bytes_of = {i: self._bytes(token) for i, token in tokens.items()}

    def extended(self, tokenizer: Tokenizer, added: Sequence[tuple[int, AddedToken]]) -> Vocabulary:
        """The vocabulary of a tokenizer that has these tokens more. It takes memory for these only.

        added: with their ids.
        """
        new = {number: token.content for number, token in added}
        other = copy(self)
        other._tokenizer = tokenizer
        other._spelt = self._spelt | new
        other.added = self.added | new.keys()
        other.special = self.special.union(number for number, token in added if token.special)
        other.size = max(self.size, 1 + max(new))
        own = {number: self._bytes(token) for number, token in new.items()}
        other.bytes_of = ChainMap(own, cast(dict[int, bytes | None], self.bytes_of))
        return other

    def special_id(self, text: str) -> int | None:
        """The special token that is spelled like this, None if there is none."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id if token_id in self.special else None

    def _bytes(self, token: str) -> bytes | None:
        if self._byte_level:
            return _bytes_of_characters(token)
        return _byte_of_name(token) if self._byte_fallback else None

    def text_after(self, before: int | None, token_id: int) -> str:
        """The text that a token adds behind another, or at the beginning of a text."""
        if before is None:
            return self._decode([token_id])
        return self._decode([before, token_id]).removeprefix(self._decode([before]))

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def spelling(self, token_id: int) -> bytes:
        """What a token is written as, whatever stands beside it, special tokens too."""
        if (content := self._spelt.get(token_id)) is not None:
            return content.encode()
        if (data := self.bytes_of.get(token_id)) is not None:
            return data
        token = self._tokenizer.id_to_token(token_id) or ""
        return (token.replace(_WORD_START, " ") if self._word_starts else token).encode()


def _kinds(decoder: dict[str, Any]) -> set[str]:
    return {decoder["type"]}.union(*(_kinds(inner) for inner in decoder.get("decoders", ())))


def _byte_of_name(token: str) -> bytes | None:
    """The byte that ``<0xE2>`` names."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _bytes_of_characters(token: str) -> bytes:
    """The bytes that GPT-2's characters stand for; a token with any other character is itself."""
    byte_of = _byte_of_character()
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:
        return token.encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The printable characters GPT-2's vocabulary spells bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
