"""The tokenizer, chat template and end tokens in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import ReaderField
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.loaders.errors import CheckpointError

try:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )
except ImportError as error:
    raise CheckpointError("GGUF files need transformers 5.24 or later: upgrade it") from error

# Splits of byte-level vocabularies that transformers' conversion does as they are: GPT-2's.
_GPT2 = ("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling")
# Those which split off every digit before that.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Those of vocabularies whose texts begin with the BOS unless the file says otherwise, and those in
# which a word that is a token is never merged from parts (llama.cpp has the same lists).
_LLAMA3 = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "tekken"),
)
_BOS = (*_LLAMA3, "chameleon")
_WHOLE_WORDS = (*_LLAMA3, "youtu", "glm4", "glm5", "minicpm5", "granite-embed-multi-97m")
# Tokens after which an answer has ended, whatever the file names as its end token (llama.cpp has
# the same list).
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "<|end_of_text|>", "<|return|>", "<turn|>", "<|END_OF_TURN_TOKEN|>"),
)


def save_tokenizer(
    file: Path, metadata: Mapping[str, ReaderField], folder: Path
) -> PreTrainedTokenizerBase:
    """Write the tokenizer's files. Raises CheckpointError if its text splitting is not known."""
    kind = _text(metadata, "tokenizer.ggml.model")
    split = _text(metadata, "tokenizer.ggml.pre")
    known = (*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2, *_DIGITS)
    if kind == "gpt2" and split not in known:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.pre is {split!r}, a way to split texts which is not known; "
            f"known are {', '.join(known)}. A model's folder with tokenizer.json can be served"
        )
    try:
        architecture, contents, settings = get_gguf_tokenizer(str(file))
        backend, _ = convert_gguf_tokenizer(architecture, contents)
        if kind == "gpt2" and split in _DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        if kind == "gpt2" and split in _WHOLE_WORDS:
            backend.model.ignore_merges = True
        if kind == "gpt2" and split in _BOS and settings["bos_token"] is not None:
            settings.setdefault("add_bos_token", True)
        if kind == "llama" and contents.get("add_prefix_space") is False:
            _without_prefix(backend)
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend, **settings
        )
    except Exception as error:  # conversions raise errors of any type
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: its tokenizer cannot be read: {reason}") from error
    tokenizer.save_pretrained(folder)
    return tokenizer


def _without_prefix(backend: Tokenizer) -> None:
    """Let a sentencepiece vocabulary put no space before a text, and take none from it."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def end_tokens(
    metadata: Mapping[str, ReaderField], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The ids of the tokens that end an answer."""
    stated = [
        int(metadata[key].contents())
        for name in ("eos", "eot", "eom")
        if (key := f"tokenizer.ggml.{name}_token_id") in metadata
    ]
    vocabulary = tokenizer.get_vocab()
    return list(dict.fromkeys([*stated, *(vocabulary[t] for t in _ENDS if t in vocabulary)]))


def _text(metadata: Mapping[str, ReaderField], key: str) -> str | None:
    return str(metadata[key].contents()) if key in metadata else None
