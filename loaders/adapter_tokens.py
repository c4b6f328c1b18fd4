"""Tokens that an adapter's tokenizer has beside the base model's.

Training libraries save the tokenizer with an adapter. If tokens were added to it, the adapter was
trained on texts in which these are single tokens, with rows of their own in the embedding and the
output layer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from nybble.loaders.errors import AdapterError
from nybble.loaders.token_worker import ADDED, SPECIAL, TOKENIZER_JSON

TOKEN_FILES = (TOKENIZER_JSON, ADDED, SPECIAL)
# Run as a file, not as a module: importing the packages around it would dominate its start.
_WORKER = Path(__file__).with_name("token_worker.py")


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


class OwnTokenReader:
    """Finds out which tokens the tokenizers of adapters add to a base's.

    Processes of its own read them (:mod:`nybble.loaders.token_worker`). May be used from any
    thread; one waits for another.
    """

    def __init__(self, base: TextTokenizer) -> None:
        """Takes tenths of a second for a large vocabulary, in which no other thread runs."""
        known = base.backend_tokenizer.get_vocab(with_added_tokens=True)
        self._known = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        json.dump(known, self._known)
        self._known.flush()
        weakref.finalize(self, self._known.close)
        self._lock = threading.Lock()

    def read(self, folder: Path) -> OwnTokens | None:
        """The tokens that an adapter's tokenizer adds to the base's; None if it adds none.

        Raises AdapterError if it adds any and gives other ids to the base's, or lacks some of them,
        and for a file that is too large or is not what it should be.
        """
        with self._lock:
            self._known.seek(0)
            done = subprocess.run(
                [sys.executable, "-I", str(_WORKER), str(folder)],
                stdin=self._known,
                capture_output=True,
                check=False,
            )
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise AdapterError(
                f"the tokenizer of {folder} cannot be read: the process that reads it ended with "
                f"exit code {done.returncode}{last and f': {last}'}"
            )
        found = json.loads(done.stdout)
        if "refused" in found:
            raise AdapterError(found["refused"])
        if not found["added"]:
            return None
        added = tuple((number, AddedToken(**token)) for number, token in found["added"])
        return OwnTokens(added, found["special"])
