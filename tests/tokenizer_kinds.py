"""Small tokenizers of the kinds that models have."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = ["the quick brown fox jumps over the lazy dog", "<tool_call> im_end <s> </s> s> the user"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]
# Not special, as Qwen's; the last are Gemma's kind, which only save tokens.
NOT_SPECIAL = ["<tool_call>", "\n\n", "<b>"]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in NOT_SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def byte_level() -> PreTrainedTokenizerBase:
    """As Qwen's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return fast(tokenizer)


def llama2() -> PreTrainedTokenizerBase:
    """As Llama 2's: a space before every text, and markers among the pieces of the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*sorted(set("".join(CORPUS)) - {" "}), "▁", "s>", "th", "the", "▁the"]
    merges = [("s", ">"), ("<", "s>"), ("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in ("<s>", "</s>")])
    return fast(tokenizer)


def mistral() -> PreTrainedTokenizerBase:
    """As newer Mistrals': a space before the first text only."""
    tokenizer = llama2().backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return fast(tokenizer)


TOKENIZERS = {"byte-level": byte_level(), "llama 2": llama2(), "mistral": mistral()}
