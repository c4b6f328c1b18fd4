"""Tokenizers of checkpoints: a sentencepiece model encodes as sentencepiece does, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import PreTrainedTokenizerBase

from nybble.loaders import CheckpointError
from nybble.loaders.tokenizer import check_vocabulary, load_tokenizer

CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog barks at the moon",
    "def add(first, second):\n    return first + second",
    "for item in items:",
    "    print(item)  # twice",
    "naïve café, größer, Ελληνικά, русский, 日本語, emoji 🙂🚀",
) * 20

ODD_TEXTS = (
    "",
    " ",
    "\n",
    "hello world",
    " leading",
    "  two leading",
    "trailing  ",
    "a  b   c",
    "a\nb\n\n  c",
    "\ttab\r\n",
    "日本語 ✓ emoji 🙂🚀 👩‍💻",
    "é e\u0301 ﬁ Ａ",
    "▁ already ▁▁",
    "x\u00a0y\u200bz",
    "\x00 and \x7f",
)


def write_sentencepiece(
    folder: Path,
    *,
    kind: str = "bpe",
    prefix: bool = True,
    settings: dict[str, object] | None = None,
    **options: object,
) -> Path:
    """A folder with tokenizer.model as Llama 2's (or, without the prefix, Gemma's) and no JSON."""
    SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(CORPUS),
            "model_prefix": str(folder / "tokenizer"),
            "model_type": kind,
            "vocab_size": 400 if kind == "bpe" else 340,
            "byte_fallback": True,
            "add_dummy_prefix": prefix,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "hard_vocab_limit": False,
            "character_coverage": 0.99,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "minloglevel": 2,
        }
        | options
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | (settings or {})))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["as Llama 2", "as Gemma"])
def folder(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp(kind), kind=kind, prefix=request.param)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[PreTrainedTokenizerBase, SentencePieceProcessor]:
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return load_tokenizer(folder), original


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_are_encoded_as_by_sentencepiece(
    pair: tuple[PreTrainedTokenizerBase, SentencePieceProcessor], text: str
) -> None:
    tokenizer, original = pair
    assert tokenizer.is_fast
    assert ids(tokenizer, text) == original.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("the dog\n\t  ▁é日🙂<s>0x1"), max_size=30))
def test_any_text_is_encoded_as_by_sentencepiece(
    pair: tuple[PreTrainedTokenizerBase, SentencePieceProcessor], text: str
) -> None:
    tokenizer, original = pair
    if "<s>" not in text:  # which is a token for tokenizers and text for sentencepiece
        assert ids(tokenizer, text) == original.encode(text)


@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if text.strip(" ▁") == text])
def test_text_survives(
    pair: tuple[PreTrainedTokenizerBase, SentencePieceProcessor], text: str
) -> None:
    tokenizer, original = pair
    assert tokenizer.decode(ids(tokenizer, text)) == original.decode(original.encode(text))


def test_special_tokens_are_those_of_the_model(
    pair: tuple[PreTrainedTokenizerBase, SentencePieceProcessor],
) -> None:
    tokenizer, original = pair
    assert tokenizer.bos_token_id == original.bos_id() == 1
    assert tokenizer.eos_token_id == original.eos_id() == 2
    assert tokenizer("the dog")["input_ids"] == [1, *original.encode("the dog")]
    beginning, *rest = tokenizer("<s>the dog</s>", add_special_tokens=False)["input_ids"]
    assert (beginning, rest) == (1, [*original.encode("the dog"), 2])


def test_a_symbol_that_the_training_was_told_of_stays_whole_and_is_text(
    tmp_path: Path, kind: str
) -> None:
    write_sentencepiece(tmp_path, kind=kind, user_defined_symbols=["<|im_start|>", "\n\n"])
    tokenizer = load_tokenizer(tmp_path)
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "a<|im_start|>user\n\nthe dog"
    assert ids(tokenizer, text) == original.encode(text)
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == text


def test_legacy_false_puts_no_space_behind_special_tokens(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, settings={"legacy": False})
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(ids(tokenizer, "the<s>the"))
    assert tokens[:2] == ["▁the", "<s>"]
    assert "".join(tokens[2:]) == "the"


def test_what_would_be_encoded_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    # The normalization removes a line break before the symbol of two can be seen.
    write_sentencepiece(
        tmp_path,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        user_defined_symbols=["\n\n"],
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be converted: .*'\\n\\n'"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_not_sentencepieces_is_refused_by_name(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_model_without_tokenizer_files_is_refused_though_transformers_makes_a_tokenizer(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_model() / file).read_bytes())
    with pytest.raises(CheckpointError, match=r"has neither tokenizer\.json nor"):
        load_tokenizer(tmp_path)


def test_another_models_tokenizer_is_warned_of(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokens = len(tokenizer)
    check_vocabulary(tokenizer, tokens)
    check_vocabulary(tokenizer, 2 * tokens)
    assert not caplog.records
    check_vocabulary(tokenizer, 2 * tokens + 1)
    assert f"knows {tokens} tokens and the model {2 * tokens + 1}" in caplog.text
    check_vocabulary(tokenizer, tokens - 3)
    assert "knows 3 tokens, such as" in caplog.text


def test_a_tokenizer_that_would_cut_or_pad_does_neither(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((tiny_model() / file).read_bytes())
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    settings["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    backend = load_tokenizer(tmp_path).backend_tokenizer
    assert len(backend.encode("x").ids) == 1
    assert len(backend.encode("x y z").ids) == 5


@pytest.mark.parametrize("content", ["", "{", '{"model": {"type": "BPE"}}', '{"version": "1.0"}'])
def test_a_damaged_tokenizer_json_is_named(
    tiny_model: Callable[..., Path], tmp_path: Path, content: str
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{folder / 'tokenizer.json'} is damaged .*again"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named_as_one(
    tiny_model: Callable[..., Path], tmp_path: Path, file: str
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    if file == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / file).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"
    )
    with pytest.raises(CheckpointError, match=rf"{folder / file} is a git-lfs pointer.*lfs pull"):
        load_tokenizer(folder)
