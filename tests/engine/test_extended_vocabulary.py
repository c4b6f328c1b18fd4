"""An adapter's vocabulary, made of the base's for the library of grammars, is the one that the
library makes of the adapter's tokenizer itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import AddedToken

from nybble.engine import GrammarCompiler
from nybble.engine.guide import GrammarGuide
from nybble.loaders.adapter_tokens import ExtendedTokenizer, OwnTokens

from ..tokenizer_kinds import TOKENIZERS

OBJECT = {
    "type": "object",
    "properties": {"a": {"enum": ["zyx", "<plan>", "the fox"]}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
GRAMMARS: dict[str, Callable[[GrammarCompiler], GrammarGuide]] = {
    "object": lambda compiler: compiler.json_schema(OBJECT),
    "string": lambda compiler: compiler.json_schema({"type": "string"}),
    "regex": lambda compiler: compiler.regex("[a-z<>ü]{3,20}"),
    "choice": lambda compiler: compiler.choice(["yes zyx", "no <plan>", "the quick"]),
    "special tokens": lambda compiler: compiler.grammar('start: <|tool|> "x" <|im_start|>'),
}
TEXTS = ("hello world", 'the {"a": 1}', " x", "zyx over", "日本 🙂", "{", "\n\n", "")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_it_is_the_same_token_by_token_and_mask_by_mask(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    size, ends = len(tokenizer), frozenset({tokenizer.eos_token_id})
    added = (
        AddedToken("<plan>", special=False, normalized=False),
        AddedToken("<|tool|>", special=True),
        AddedToken("zyx", special=False),
    )
    own = ExtendedTokenizer(tokenizer, OwnTokens(tuple(enumerate(added, size)), {}))
    base = GrammarCompiler(tokenizer, size, ends)
    rows = size + 8  # as a matrix whose size is rounded up
    extended = GrammarCompiler(own, rows, ends, base=base)
    whole = GrammarCompiler(own, rows, ends)
    found, expected = extended._vocabulary.get(), whole._vocabulary.get()
    assert (found.vocab_size, found.eos_tokens) == (expected.vocab_size, expected.eos_tokens)
    for number in range(size + len(added)):
        assert found.decode_bytes([number]) == expected.decode_bytes([number]), number
        assert found.is_special_token(number) == expected.is_special_token(number), number
    for text in TEXTS:
        assert found.tokenize_str(text) == expected.tokenize_str(text), text
    generator = random.Random(0)
    for name, make in GRAMMARS.items():
        for _ in range(20):
            one, other = make(extended), make(whole)
            for _ in range(40):
                allowed = one.allowed()
                assert torch.equal(allowed, other.allowed()), name
                token = generator.choice(allowed.nonzero()[:, 0].tolist())
                if one.accept(token) | other.accept(token):
                    break


def test_rows_without_tokens_of_an_adapters_own_are_never_allowed() -> None:
    """A matrix of its own that is larger, and no tokens that the base's tokenizer has not."""
    tokenizer = TOKENIZERS["byte-level"]
    size, ends = len(tokenizer), frozenset({tokenizer.eos_token_id})
    base = GrammarCompiler(tokenizer, size, ends)
    guide = GrammarCompiler(tokenizer, size + 16, ends, base=base).regex("[a-z]+")
    allowed = guide.allowed()
    assert len(allowed) == size + 16
    assert not allowed[size:].any()
    assert torch.equal(allowed[:size], base.regex("[a-z]+").allowed())
