"""Tokens to text one by one: whole characters, nothing of the prompt, whatever the bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from nybble.engine.detokenizer import Detokenizer
from nybble.engine.request import SamplingParams

WORDS = ("▁", "▁the", "▁dog", "s", ".", "☃")


@pytest.fixture(scope="module")
def byte_level(tiny_model: Callable[..., Path]) -> Tokenizer:
    """As GPT-2's, Qwen's and Llama 3's: every token is some bytes."""
    return Tokenizer.from_file(str(tiny_model() / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: words, and a token for each byte of what is none."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def ids_of(tokenizer: Tokenizer, *parts: str | bytes) -> list[int]:
    """Tokens by name; bytes as the tokens of single bytes."""
    names = [
        name
        for part in parts
        for name in ([part] if isinstance(part, str) else [f"<0x{byte:02X}>" for byte in part])
    ]
    return [tokenizer.token_to_id(name) for name in names]


def texts(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams())
    return [detokenizer.add(token) for token in output]


def test_characters_come_out_whole(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    prompt = byte_level.encode("the dog").ids
    output = byte_level.encode(" 🙂 barks").ids
    assert texts(byte_level, prompt, output)[:5] == [" ", "", "", "🙂", " b"]
    output = ids_of(byte_fallback, "▁dog", "🙂".encode(), "s", "▁the")
    assert texts(byte_fallback, ids_of(byte_fallback, "▁the"), output) == (
        [" dog", "", "", "", "🙂", "s", " the"]
    )


@pytest.mark.parametrize("cut", [1, 2])
def test_an_output_that_ends_the_prompts_last_character_does_not_repeat_the_prompt(
    byte_level: Tokenizer, byte_fallback: Tokenizer, cut: int
) -> None:
    whole = byte_level.encode("the dog 🙂").ids
    prompt, rest = whole[:-cut], whole[-cut:]
    assert "".join(texts(byte_level, prompt, rest)) == "🙂"
    # What does not end it leaves it as it was in the prompt.
    assert "".join(texts(byte_level, prompt, byte_level.encode(" barks").ids)) == " barks"
    prompt = ids_of(byte_fallback, "▁the", "🙂".encode()[:-cut])
    assert texts(byte_fallback, prompt, ids_of(byte_fallback, "🙂".encode()[-cut:]))[-1] == "🙂"
    assert texts(byte_fallback, prompt, ids_of(byte_fallback, "▁dog")) == [" dog"]


def test_a_prompt_that_ends_with_the_replacement_character_is_not_repeated(
    byte_level: Tokenizer,
) -> None:
    prompt, output = byte_level.encode("the dog \ufffd").ids, byte_level.encode(" barks").ids
    assert "".join(texts(byte_level, prompt, output)) == " barks"


def test_bytes_that_are_no_character_behind_some_that_are(byte_fallback: Tokenizer) -> None:
    output = ids_of(byte_fallback, "🙂".encode(), b"\xc3", "▁dog", "s", "▁the", "é".encode(), ".")
    assert texts(byte_fallback, ids_of(byte_fallback, "▁the"), output) == (
        ["", "", "", "🙂", "", "\ufffd dog", "s", " the", "", "é", "."]
    )
    prompt = ids_of(byte_fallback, "▁the", "🙂".encode(), b"\xc3")
    assert texts(byte_fallback, prompt, ids_of(byte_fallback, "▁dog", "s")) == [" dog", "s"]


def test_a_stop_string_is_found_behind_them(byte_fallback: Tokenizer) -> None:
    params = SamplingParams(stop=("dogs",))
    detokenizer = Detokenizer(byte_fallback, ids_of(byte_fallback, "▁the"), params)
    output = ids_of(byte_fallback, "🙂".encode(), b"\xc3", "▁dog", "s")
    assert "".join(map(detokenizer.add, output)) == "🙂\ufffd "
    assert detokenizer.stopped


def test_no_sequence_of_tokens_raises(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    generator = random.Random(0)
    for tokenizer in (byte_level, byte_fallback):
        size = tokenizer.get_vocab_size()
        beyond = size + 3  # an embedding may have more rows than the tokenizer has tokens
        for _ in range(1500):
            prompt = [generator.randrange(size) for _ in range(generator.randrange(1, 12))]
            texts(tokenizer, prompt, [generator.randrange(beyond) for _ in range(16)])


def spoken(tokenizer: Tokenizer, output: list[int], **options: Any) -> tuple[str, bool]:
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(**options))
    text = ""
    for token in output:
        text += detokenizer.add(token)
        if detokenizer.stopped:
            break
    return text + detokenizer.flush(), detokenizer.stopped


def test_special_tokens_are_text_only_where_asked(byte_fallback: Tokenizer) -> None:
    output = ids_of(byte_fallback, "▁the", "</s>", "▁dog")
    assert "</s>" not in spoken(byte_fallback, output)[0]
    assert "</s>" in spoken(byte_fallback, output, skip_special_tokens=False)[0]
    stopped = {"skip_special_tokens": False, "stop": ("</s>",)}
    assert spoken(byte_fallback, output, **stopped) == ("the", True)


def test_special_tokens_in_a_row_have_no_space_between_where_asked() -> None:
    words = Tokenizer(
        models.WordLevel({"a": 0}, "a")
    )  # without a decoder, words are joined by spaces
    words.add_special_tokens(["<s>", "</s>"])
    output = [words.token_to_id(name) for name in ("a", "<s>", "</s>", "</s>", "a")]
    asked = {"skip_special_tokens": False}
    assert spoken(words, output, **asked)[0] == "a <s> </s> </s> a"
    asked["spaces_between_special_tokens"] = False
    assert spoken(words, output, **asked)[0] == "a <s></s></s> a"


def test_a_stop_string_is_part_of_the_text_where_asked(byte_level: Tokenizer) -> None:
    output = byte_level.encode("one two three two").ids
    assert spoken(byte_level, output, stop=("two",)) == ("one ", True)
    asked = {"include_stop_str_in_output": True}
    assert spoken(byte_level, output, stop=("two", "wo thr"), **asked) == ("one two", True)


def test_stop_strings_are_not_looked_for_before_min_tokens(byte_level: Tokenizer) -> None:
    output = byte_level.encode("one two three two").ids
    first = byte_level.encode("one two").ids
    text, stopped = spoken(byte_level, output, stop=("two",), min_tokens=len(first))
    assert (text, stopped) == ("one two three ", True)
