"""Tokens to text one by one: whole characters, nothing of the prompt, whatever the bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nybble.engine.detokenizer import Detokenizer
from nybble.engine.request import SamplingParams
from nybble.engine.vocabulary import Vocabulary, _byte_of_character

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
    detokenizer = Detokenizer(Vocabulary(tokenizer), prompt, SamplingParams())
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
    detokenizer = Detokenizer(Vocabulary(byte_fallback), ids_of(byte_fallback, "▁the"), params)
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


CORPUS = [
    "The quick brown fox doesn't jump over 13 lazy dogs, does it? No: it is, well, tired.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — „ach“, sagte er.",
    "def f(x):\n    return [y ** 2 for y in x if y != 0]\n\n\n# done\t1.5e-3",
    "色は匂へど散りぬるを 我が世誰ぞ常ならむ。",
    "🙂👍🏽 family: 👨‍👩‍👧 flags: 🇫🇷🇯🇵 é vs é",
    "  two spaces,   three,    four  ",
]


def _byte_level() -> Tokenizer:
    """As GPT-2's, Qwen's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: words of some scripts, bytes for all others."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    latin = [text for text in CORPUS if max(text) < "\u2100"]
    trained.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    merges = [tuple(pair) for pair in learned["merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _word_piece() -> Tokenizer:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False),
    )
    return tokenizer


def _unigram() -> Tokenizer:
    """As T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


KINDS = {
    "byte-level": _byte_level,
    "byte-fallback": _byte_fallback,
    "word-piece": _word_piece,
    "unigram": _unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = KINDS[request.param]()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def streamed(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    detokenizer = Detokenizer(Vocabulary(tokenizer), prompt, SamplingParams())
    return "".join([*map(detokenizer.add, output), detokenizer.flush()])


def whole_characters(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens that may end within a character."""
    text, end = tokenizer.decode(ids), len(ids)
    while tokenizer.decode(ids[:end]).endswith("\ufffd"):
        end -= 1
    # With byte tokens all of a run is replaced, so it is the tokens that are left out; in a
    # byte-level vocabulary the last token may have whole characters too.
    return max(text.rstrip("\ufffd"), tokenizer.decode(ids[:end]), key=len)


def test_the_stream_is_what_the_tokenizer_decodes_wherever_the_prompt_ends(
    trained: Tokenizer,
) -> None:
    chance = random.Random(0)
    added = [trained.token_to_id(name) for name in ("<s>", "</s>", "<tool>")]
    for text in CORPUS:
        ids = trained.encode(text).ids
        for _ in range(5):
            at = chance.randrange(len(ids))
            more = [*ids[:at], chance.choice(added), *ids[at:]]
            if "\ufffd" not in trained.decode(more):  # else it stands within a character
                ids = more
            whole = trained.decode(ids)
            for cut in range(len(ids) + 1):
                written = whole_characters(trained, ids[:cut])
                assert written + streamed(trained, ids[:cut], ids[cut:]) == whole


def test_any_tokens_at_all_are_what_the_tokenizer_decodes(trained: Tokenizer) -> None:
    chance = random.Random(1)
    size = trained.get_vocab_size() + 3  # an embedding may have more rows than there are tokens
    # A tokenizer with byte tokens replaces characters too, if they stand beside other bytes.
    ids = [i for i in range(size) if not (trained.id_to_token(i) or "").startswith("<0x")]
    for _ in range(600):
        prompt = chance.choices(ids, k=chance.randrange(5))
        output = chance.choices(ids, k=chance.randrange(1, 12))
        before, whole = trained.decode(prompt), trained.decode(prompt + output)
        if not whole.startswith(before):  # the output has completed the prompt's last character
            before = before[:-1]
        assert streamed(trained, prompt, output) == whole[len(before) :]


def test_bytes_among_words_are_read_as_far_as_they_are_characters(
    byte_fallback: Tokenizer,
) -> None:
    chance = random.Random(2)
    pieces = ["🙂", "é", "☃", "a"]
    for _ in range(600):
        output: list[int] = []
        expected = b""
        for _ in range(chance.randrange(1, 10)):
            if chance.random() < 0.4:
                output += ids_of(byte_fallback, "▁dog", "s")
                expected += b" dogs"
            else:
                data = chance.choice(pieces).encode()
                data = data if chance.random() < 0.6 else data[: chance.randrange(len(data) + 1)]
                output += ids_of(byte_fallback, data)
                expected += data
        prompt = ids_of(byte_fallback, "▁the")
        assert streamed(byte_fallback, prompt, output) == expected.decode(errors="replace")


def test_characters_of_a_prompt_of_many_bytes_are_not_garbled(byte_fallback: Tokenizer) -> None:
    for length in range(1, 12):
        prompt = ids_of(byte_fallback, ("☃" * length).encode())
        assert streamed(byte_fallback, prompt, ids_of(byte_fallback, "▁dog", "s")) == " dogs"
        first = ids_of(byte_fallback, "☃".encode(), "▁dog")
        assert streamed(byte_fallback, prompt, first) == "☃ dog"
        cut = ids_of(byte_fallback, ("☃" * length).encode()[:-1])
        rest = ids_of(byte_fallback, "☃".encode()[-1:], "▁dog")
        assert streamed(byte_fallback, cut, rest) == "☃ dog"


def test_a_token_that_ends_a_character_and_begins_another_shows_the_first() -> None:
    """Whole characters come out at once, at the end too, and a stop string in them is seen."""
    spelled = {bytes([byte]): character for character, byte in _byte_of_character().items()}

    def name(text: bytes) -> str:
        return "".join(spelled[bytes([byte])] for byte in text)

    tokens = [b"a", b"\xc3", b"\xa9\xc3", "é".encode() + b"\xc3"]
    tokenizer = Tokenizer(models.BPE({name(t): i for i, t in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary(tokenizer)
    assert texts(tokenizer, [0], [3, 2, 0]) == ["é", "é", "\ufffda"]
    detokenizer = Detokenizer(vocabulary, [0], SamplingParams())
    assert [detokenizer.add(3), detokenizer.flush()] == ["é", "\ufffd"]
    stopping = Detokenizer(vocabulary, [0], SamplingParams(stop=("é",)))
    assert [stopping.add(1), stopping.add(2), stopping.flush()] == ["", "", ""]
    assert stopping.stopped


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return str(self._tokenizer.decode(ids, **options))


def test_tokens_without_text_take_no_longer_the_more_there_are(
    byte_level: Tokenizer, byte_fallback: Tokenizer
) -> None:
    continuation = next(
        i for i in range(byte_level.get_vocab_size()) if byte_level.id_to_token(i) == "Ļ"
    )
    for tokenizer, token in (
        (byte_fallback, byte_fallback.token_to_id("</s>")),
        (byte_fallback, byte_fallback.token_to_id("<0x99>")),
        (byte_level, continuation),
    ):
        counting = Counting(tokenizer)
        detokenizer = Detokenizer(Vocabulary(counting), [token] * 100, SamplingParams())  # type: ignore[arg-type]
        for _ in range(3000):
            detokenizer.add(token)
        assert counting.decoded <= 3 * 3000


def spoken(tokenizer: Tokenizer, output: list[int], **options: Any) -> tuple[str, bool]:
    detokenizer = Detokenizer(Vocabulary(tokenizer), [], SamplingParams(**options))
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


@pytest.mark.parametrize("early", range(1, 8))
def test_a_stop_string_counts_if_its_end_comes_after_min_tokens(
    byte_level: Tokenizer, early: int
) -> None:
    output = [byte_level.token_to_id(letter) for letter in "xyENDz"]
    expected = ("xy", True) if early < 5 else ("xyENDz", False)
    assert spoken(byte_level, output, stop=("END",), min_tokens=early) == expected


def test_special_tokens_that_are_shown_stand_in_the_text(byte_level: Tokenizer) -> None:
    """As a parser of an answer needs to see some markers, and no others."""
    vocabulary = Vocabulary(byte_level)
    first, second = sorted(vocabulary.special)[:2]
    marker = vocabulary.spelling(first).decode()
    tokens = [*byte_level.encode("fox").ids, first, second, *byte_level.encode("dog").ids]
    for shown, text in ((frozenset({first}), f"fox{marker}dog"), (frozenset(), "foxdog")):
        params = SamplingParams(shown_special_tokens=shown)
        detokenizer = Detokenizer(vocabulary, [], params)
        assert "".join(map(detokenizer.add, tokens)) + detokenizer.flush() == text


def test_the_stop_string_that_was_found_is_told(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(Vocabulary(byte_level), [], SamplingParams(stop=("cat", "dog")))
    for token in byte_level.encode("the dog and").ids:
        detokenizer.add(token)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped_by == "dog"
