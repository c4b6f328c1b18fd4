"""Tokens that an adapter's tokenizer has beside the base model's.

Training libraries save the tokenizer with an adapter. If tokens were added to it, the adapter was
trained on texts in which these are single tokens, with rows of their own in the embedding and the
output layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from nybble.loaders.adapter_settings import TOKENIZER
from nybble.loaders.errors import AdapterError
from nybble.loaders.json_file import read_json_object

TOKENIZER_JSON = "tokenizer.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"
TOKEN_FILES = (TOKENIZER_JSON, ADDED, SPECIAL)
# The largest known, of vocabularies of 260,000 tokens, have 34 MB.
_MOST_BYTES = 128 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_WITHOUT = (
    "remove the tokenizer's files from the adapter's folder, or have the server use the base "
    "model's own (--no-lora-own-settings)"
)


class TextTokenizer(Protocol):
    """What encoding and decoding need of a tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    @property
    def bos_token(self) -> str | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...


@dataclass(frozen=True)
class OwnTokens:
    """What an adapter's tokenizer has beside the base's.

    added: its tokens by their ids, in ascending order.
    special: those that it names, such as ``eos_token``, which chat templates are given.
    """

    added: tuple[tuple[int, AddedToken], ...]
    special: Mapping[str, str]

    def below(self, rows: int) -> OwnTokens:
        """Those tokens for which a matrix of so many rows has any."""
        return OwnTokens(tuple(each for each in self.added if each[0] < rows), self.special)

    @property
    def key(self) -> str:
        """The same text for the same tokens."""
        tokens = [(number, token.__getstate__()) for number, token in self.added]
        return repr((tokens, sorted(self.special.items())))


class ExtendedTokenizer:
    """The base's tokenizer with an adapter's tokens beside its own; see :class:`TextTokenizer`.

    It shares the vocabulary with the base's, so that it takes little memory.
    """

    def __init__(self, base: TextTokenizer, own: OwnTokens) -> None:
        """Raises ValueError if a token would get another id than it has."""
        backend = base.backend_tokenizer
        extended = Tokenizer(backend.model)
        # The property of a part that there is none of cannot be set.
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (value := getattr(backend, part)) is not None:
                setattr(extended, part, value)
        known = backend.get_added_tokens_decoder()
        expected = {**known, **dict(own.added)}
        for number in sorted(expected):
            extended.add_tokens([expected[number]])
            if extended.token_to_id(expected[number].content) != number:
                raise ValueError(
                    f"{expected[number].content!r} is token {number}, and cannot be added as that "
                    "to the base model's tokenizer"
                )
        self.backend_tokenizer = extended
        self.special_tokens_map = {**base.special_tokens_map, **own.special}
        self._base = base

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """The base's: an adapter's own is not its tokenizer's here."""
        return self._base.chat_template

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @cached_property
    def eos_token_id(self) -> int | None:
        return self._id(self.special_tokens_map.get("eos_token"))

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)


def add_own_tokens(tokenizer: PreTrainedTokenizerBase, own: OwnTokens) -> None:
    """Add an adapter's tokens to a model's own tokenizer.

    Raises AdapterError if a token would get another id than it has.
    """
    for number, token in own.added:
        tokenizer.add_tokens([token])
        if tokenizer.convert_tokens_to_ids(token.content) != number:
            raise AdapterError(
                f"{token.content!r} is token {number}, and cannot be added as that to the base "
                "model's tokenizer"
            )
    tokenizer.add_special_tokens(dict(own.special))


def read_own_tokens(folder: Path, base: TextTokenizer) -> OwnTokens | None:
    """The tokens that an adapter's tokenizer adds to the base's; None if it adds none.

    Raises AdapterError if it adds any and gives other ids to the base's, or lacks some of them, and
    for a file that is too large or is not what it should be.
    """
    for name in (*TOKEN_FILES, TOKENIZER):
        path = folder / name
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise AdapterError(f"{path} has over {_MOST_BYTES >> 20} MiB")
    try:
        added, vocabulary = _tokens(folder)
        known = base.backend_tokenizer.get_vocab(with_added_tokens=True)
        new = [each for each in added.items() if each[1].content not in known]
        if not new:
            return None
        _require_same(folder, known, added, vocabulary)
        special = _named(folder, known.keys() | {token.content for _, token in new})
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise AdapterError(
            f"the tokenizer of {folder} cannot be read: {error!s}; mend it, or {_WITHOUT}"
        ) from error
    return OwnTokens(tuple(sorted(new, key=lambda each: each[0])), special)


def _tokens(folder: Path) -> tuple[dict[int, AddedToken], dict[str, int] | None]:
    """The added tokens by their ids, and the vocabulary beneath them if its file can be read."""
    path = folder / TOKENIZER_JSON
    if path.is_file():
        file = read_json_object(path)
        pieces = file["model"]["vocab"]
        if isinstance(pieces, list):  # unigrams: [piece, score]
            pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
        return {int(each["id"]): _token(each) for each in file.get("added_tokens") or ()}, pieces
    path = folder / TOKENIZER
    found = read_json_object(path).get("added_tokens_decoder") if path.is_file() else None
    if found:
        return {int(number): _token(each) for number, each in found.items()}, None
    path = folder / ADDED
    named = set(_named(folder, None).values())
    by_text = read_json_object(path) if path.is_file() else {}
    return {
        int(number): AddedToken(text, special=text in named, normalized=text not in named)
        for text, number in by_text.items()
    }, None


def _token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        entry["content"], **{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
    )


def _require_same(
    folder: Path,
    known: Mapping[str, int],
    added: Mapping[int, AddedToken],
    vocabulary: Mapping[str, int] | None,
) -> None:
    """Raises AdapterError unless all but new tokens are the base's."""

    def refuse(what: str) -> AdapterError:
        return AdapterError(
            f"the tokenizer of {folder} {what}: an adapter's may add tokens to the base model's, "
            f"and leaves those as they are; {_WITHOUT}"
        )

    own = {**(vocabulary or {}), **{token.content: number for number, token in added.items()}}
    taken = dict.fromkeys(known.values())
    for token, number in own.items():
        if known.get(token, number) != number:
            raise refuse(f"has {token!r} as {number}, which is {known[token]} in the base")
        if token not in known and number in taken:
            raise refuse(f"has {token!r} as {number}, which is another token in the base")
    if vocabulary is not None:
        if others := vocabulary.keys() - known.keys() - {t.content for t in added.values()}:
            raise refuse(f"has {min(others)!r} in its vocabulary, which is not in the base's")
        if missing := known.keys() - own.keys():
            raise refuse(f"lacks {min(missing)!r}, which the base has")


def _named(folder: Path, known: Iterable[str] | None) -> dict[str, str]:
    """The tokens that the tokenizer's settings name, of those that are known."""
    found: dict[str, str] = {}
    known = None if known is None else set(known)
    for name in (SPECIAL, TOKENIZER):
        path = folder / name
        settings = read_json_object(path) if path.is_file() else {}
        for key, value in settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if not (key.endswith("_token") and isinstance(text, str)):
                continue
            if known is None or text in known:
                found[key] = text
    return found
