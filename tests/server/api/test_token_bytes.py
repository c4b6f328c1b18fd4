"""Every token has the bytes it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nybble.engine import Vocabulary
from nybble.server.api.token_bytes import TokenBytes


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
@example(text="\uf900")  # Qwen's tokenizer composes characters (NFC) before it cuts them
def test_byte_level_tokens_join_to_the_text(tiny_model: Callable[..., Path], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokens = TokenBytes(Vocabulary(tokenizer.backend_tokenizer))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokens.of, ids)) == normalize("NFC", text).encode()


def test_metaspace_tokens_with_byte_fallback_join_to_the_text() -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"▁": 256, "a": 257, "▁a": 258}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = TokenBytes(Vocabulary(tokenizer.backend_tokenizer))
    ids = backend.encode("a é 🙂 a").ids
    assert b"".join(map(tokens.of, ids)) == " a é 🙂 a".encode()


def test_tokens_that_are_no_character_are_spelled_in_hex(tiny_model: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokens = TokenBytes(Vocabulary(tokenizer.backend_tokenizer))
    (last,) = (i for i in range(len(tokenizer)) if tokens.of(i) == b"\xff")
    assert tokens.text(last) == "bytes:\\xff"
    assert tokens.text(tokenizer.eos_token_id) == tokenizer.eos_token
    assert tokens.of(10**6) == b""
