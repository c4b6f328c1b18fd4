"""What token ids mean: to the base model, or to an adapter with tokens of its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from weakref import WeakValueDictionary

from nybble.engine.vocabulary import Vocabulary
from nybble.loaders import AdapterError
from nybble.loaders.adapter_settings import TOKENIZER
from nybble.loaders.adapter_tokens import (
    TOKEN_FILES,
    ExtendedTokenizer,
    OwnTokenReader,
    OwnTokens,
    TextTokenizer,
)

# Tokenizers' files whose content is remembered: most adapters of a base have the same.
_REMEMBERED = 256


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of the base model or of an adapter; one that has none of its own has the base's.

    tokenizer: between text and token ids.
    vocabulary: what its tokens stand for.
    rows: of the embedding and of the logits. Ids from there on mean nothing.
    ends: those that end a sequence.
    key: other tokens have another one; "" for the base's.
    added: how many tokens it has that the base model does not have.
    """

    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    rows: int
    ends: frozenset[int]
    key: str = ""
    added: int = 0

    @property
    def known(self) -> int:
        """One more than the highest token id that can be sampled."""
        return min(self.rows, self.vocabulary.size)


class AdapterTokens:
    """The tokens of adapters; those that have the same share them. May be used from any thread."""

    def __init__(self, base: Tokens, *, reads: bool) -> None:
        """reads: whether adapters may have tokens of their own."""
        self._base = base
        self._reader = OwnTokenReader(base.tokenizer) if reads else None
        self._read: OrderedDict[bytes, OwnTokens | None] = OrderedDict()  # by the files' content
        self._known: WeakValueDictionary[str, Tokens] = WeakValueDictionary()
        self._lock = threading.Lock()

    def of(self, folder: Path | None, vocab: int | None) -> Tokens:
        """An adapter's tokens.

        folder: with its tokenizer's files, if it may have tokens of its own.
        vocab: for how many tokens it has rows; None for as many as the base has.

        Tokens without a row are left out: text with them is encoded as the base does it. Raises
        AdapterError for a tokenizer that cannot be read or changes the base's tokens, and for fewer
        rows than the base has tokens.
        """
        base, rows = self._base, self._base.rows if vocab is None else vocab
        if rows < base.known:
            raise AdapterError(
                f"the adapter has rows for {rows} tokens, but the base model's tokenizer knows "
                f"{base.known}"
            )
        own = None if folder is None or self._reader is None else self._own(folder, self._reader)
        if own is not None:
            own = own.below(rows)
        if vocab is None and (own is None or not own.added):
            return base
        key = f"{rows} {'' if own is None else own.key}"
        with self._lock:
            if (found := self._known.get(key)) is None:
                found = self._known[key] = self._extended(own, rows, key)
        return found

    def _own(self, folder: Path, reader: OwnTokenReader) -> OwnTokens | None:
        paths = [folder / name for name in (*TOKEN_FILES, TOKENIZER)]
        contents = [path.read_bytes() if path.is_file() else b"" for path in paths]
        if not any(contents):
            return None
        digest = blake2b(digest_size=16)
        for content in contents:
            digest.update(len(content).to_bytes(8, "big"))
            digest.update(content)
        key = digest.digest()
        with self._lock:
            if key not in self._read:
                self._read[key] = reader.read(folder)
                if len(self._read) > _REMEMBERED:
                    self._read.popitem(last=False)
            self._read.move_to_end(key)
            return self._read[key]

    def _extended(self, own: OwnTokens | None, rows: int, key: str) -> Tokens:
        base = self._base
        if own is None or not own.added:
            return Tokens(base.tokenizer, base.vocabulary, rows, base.ends, key)
        try:
            tokenizer = ExtendedTokenizer(base.tokenizer, own)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        vocabulary = base.vocabulary.extended(tokenizer.backend_tokenizer, own.added)
        end = tokenizer.eos_token_id
        ends = base.ends if end is None else base.ends | {end}
        return Tokens(tokenizer, vocabulary, rows, ends, key, len(own.added))
