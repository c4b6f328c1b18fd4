"""The bytes each token stands for, as logprobs report them."""

from __future__ import annotations

from nybble.engine import Vocabulary


class TokenBytes:
    """Maps token ids to bytes and to printable text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def of(self, token_id: int) -> bytes:
        """A token's bytes; empty for a padding row of the vocabulary."""
        return self._vocabulary.spelling(token_id)

    def text(self, token_id: int) -> str:
        """A token as text; if it is not whole characters, as ``bytes:\\xe2\\x98``."""
        data = self.of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
