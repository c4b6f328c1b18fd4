"""The bytes each token stands for, as logprobs report them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nybble.engine import Vocabulary


class TokenBytes:
    """Token ids to bytes and to text that stands alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._vocabulary = Vocabulary(tokenizer.backend_tokenizer)

    def of(self, token_id: int) -> bytes:
        """Empty for an id that no token has, in an embedding padded to a round size."""
        return self._vocabulary.spelling(token_id)

    def text(self, token_id: int) -> str:
        """The token as text; one that is no whole character is spelled ``bytes:\\xe2\\x98``."""
        data = self.of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
