"""The bytes each token stands for, as logprobs report them."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

_WORD_START = "▁"


class TokenBytes:
    """Token ids to bytes, for byte-level (GPT-2, Qwen, Llama 3) and metaspace (Llama 2) tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        decoder = tokenizer.backend_tokenizer.decoder
        kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._byte_of = _byte_of_character() if "ByteLevel" in kinds else None
        self._metaspace = bool(kinds & {"Metaspace", "ByteFallback"})

    def of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        # An id beyond the vocabulary, in an embedding padded to a round size, stands for nothing.
        token = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        assert isinstance(token, str)
        if self._byte_of is not None:
            return b"".join(
                bytes([self._byte_of[character]])
                if character in self._byte_of
                else character.encode()
                for character in token
            )
        if self._metaspace:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace(_WORD_START, " ").encode()
        return token.encode()

    def text(self, token_id: int) -> str:
        """The token as text; one that is no whole character is spelled ``bytes:\\xe2\\x98``."""
        data = self.of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _kinds(decoder: dict[str, Any]) -> set[str]:
    return {decoder["type"]}.union(*(_kinds(inner) for inner in decoder.get("decoders", ())))


def _byte_of_character() -> dict[str, int]:
    """The printable characters GPT-2's vocabulary spells bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
