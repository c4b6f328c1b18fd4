"""A checkpoint's tokenizer, always one that streams: Hugging Face's ``tokenizers`` underneath."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.loaders.errors import CheckpointError, pointer

logger = logging.getLogger(__name__)

_JSON = "tokenizer.json"
# What conversions of sentencepiece models are known to get wrong: leading, trailing and repeated
# spaces, newlines, tabs, characters outside the vocabulary, Unicode variants of a letter, the mark
# that stands for a space.
_SAMPLE = (
    "The quick brown fox, 3.14 times: naïve café.",
    "  two spaces, then  two more, and one at the end ",
    "def add(a, b):\n    return a + b\n\n\n\treturn  # tab\r\n",
    "日本語 Ελληνικά русский العربية 🙂🚀 👩‍💻",
    "ﬁ Ａ e\u0301 \u00a0 \u200b ▁ ▁▁x",
    "\n",
    " ",
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, without truncation or padding.

    A folder without tokenizer.json whose tokenizer.model is sentencepiece's is converted, and the
    result is compared with sentencepiece itself. Raises CheckpointError if they differ, and for a
    folder whose tokenizer cannot be read or cannot stream.
    """
    model = folder / "tokenizer.model"
    for path in (folder / _JSON, model, folder / "tokenizer_config.json"):
        if wrong := pointer(path):
            raise CheckpointError(f"{path} {wrong}")
    try:
        if model.is_file() and not (folder / _JSON).is_file():
            tokenizer = _converted(model)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raise errors of any type, even Exception itself
        reason = " ".join(str(error).split())
        told = f"the tokenizer of {folder} cannot be read: {reason}"
        raise CheckpointError(_broken(folder / _JSON) or told) from error
    if not tokenizer.is_fast or not _knows_text(tokenizer):
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor a sentencepiece tokenizer.model: streaming "
            "needs one of them"
        )
    # A tokenizer.json may turn on either; both would silently change prompts.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _broken(path: Path) -> str | None:
    """What is wrong with a tokenizer.json; None if nothing is, or if there is none."""
    if not path.is_file():
        return None
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # of the library's own: plain Exception
        return f"{path} is damaged ({' '.join(str(error).split())}): get the file again"
    return None


def _knows_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False for what transformers makes without a file: a tokenizer of special tokens alone."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return bool(tokenizer.backend_tokenizer.get_vocab(False).keys() - special)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Warn of a tokenizer that is probably another model's.

    vocab: tokens the model knows.
    """
    known = tokenizer.get_vocab()
    beyond = sorted(token for token, id in known.items() if id >= vocab)
    if beyond:
        logger.warning(
            "the tokenizer knows %d tokens, such as %r, beyond the model's vocabulary of %d: "
            "prompts with them are refused. Is it this model's tokenizer?",
            len(beyond),
            beyond[0],
            vocab,
        )
    if len(known) < vocab / 2:
        logger.warning(
            "the tokenizer knows %d tokens and the model %d. Is it this model's tokenizer?",
            len(known),
            vocab,
        )


def _converted(model: Path) -> PreTrainedTokenizerBase:
    try:
        original = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{model} is not a sentencepiece model and there is no tokenizer.json beside it"
        ) from error
    # This class follows the file; a family's own class (LlamaTokenizer) follows fixed rules.
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        model.parent, local_files_only=True
    )
    for text in _SAMPLE:
        if text.startswith(" ") and not _prefixes_every_part(model.parent):
            continue
        found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        expected = original.encode(text)
        if found != expected:
            raise CheckpointError(
                f"{model} cannot be converted: {text!r} would become "
                f"{tokenizer.convert_ids_to_tokens(found)}, which sentencepiece encodes as "
                f"{[original.id_to_piece(token) for token in expected]}; save a tokenizer.json "
                "beside it that encodes as the model was trained"
            )
    return tokenizer


def _prefixes_every_part(folder: Path) -> bool:
    """Whether a space is put before every part of a text between special tokens.

    sentencepiece puts a space before each input. With ``legacy: false`` only a text's first part
    gets one, and none if the text already begins with a space.
    """
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return True
    return json.loads(config.read_text()).get("legacy") is not False
