"""What is between text and tokens, for the base model and for adapters with tokens of their own."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from nybble.engine import Engine, GrammarCompiler, Tokens
from nybble.server.api.output.markers import MarkerTokens
from nybble.server.api.prompts import Prompts
from nybble.server.api.token_bytes import TokenBytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """One tokenizer's encoder, markers, grammars and bytes."""

    prompts: Prompts
    markers: MarkerTokens
    grammars: GrammarCompiler
    bytes: TokenBytes


class Texts:
    """One :class:`Text` for each tokenizer, made when it is first asked for."""

    def __init__(self, engine: Engine, prompts: Prompts) -> None:
        """prompts: of the base model."""
        self._engine = engine
        self._prompts = prompts
        # An adapter's go when no version has its tokens any more: they do not refer to these.
        self._made: WeakKeyDictionary[Tokens, Text] = WeakKeyDictionary()
        self._lock = threading.Lock()
        for adapter in (None, *(each.name for each in engine.adapters())):
            self._prepare(engine.tokens_of(adapter))
        engine.before_serving_tokens(self._prepare)

    def of(self, tokens: Tokens) -> Text:
        """For requests to the base model, or to an adapter, that has these tokens."""
        with self._lock:  # adapters are loaded on other threads
            text = self._made.get(tokens)
            if text is None:
                prompts, own = self._prompts, self._engine.tokens
                if tokens.tokenizer is not own.tokenizer:
                    prompts = prompts.with_tokenizer(tokens.tokenizer)
                base = None if tokens is own else self._made[own].grammars
                text = self._made[tokens] = Text(
                    prompts,
                    MarkerTokens(tokens.tokenizer),
                    GrammarCompiler(tokens.tokenizer, tokens.rows, tokens.ends, base=base),
                    TokenBytes(tokens.vocabulary),
                )
            return text

    def _prepare(self, tokens: Tokens) -> None:
        """Read what grammars need of a vocabulary before any request has one.

        That takes tenths of a second or more, in which the library keeps all of Python waiting,
        streams too: better when a model or an adapter is loaded than amid requests.
        """
        try:
            self.of(tokens).grammars.read_vocabulary()
        except ValueError as error:
            logger.warning("grammars, schemas and forced calls cannot be used: %s", error)
