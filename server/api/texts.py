"""What is between text and tokens, for the base model and for adapters with tokens of their own."""

from __future__ import annotations

import logging
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
        # Not by the first request with a grammar: the library keeps all of Python waiting, streams
        # too, for a second or more of a processor's time.
        try:
            self.of(None).grammars.read_vocabulary()
        except ValueError as error:
            logger.warning("grammars, schemas and forced calls cannot be used: %s", error)

    def of(self, adapter: str | None) -> Text:
        """For requests to an adapter; None for the base model."""
        tokens = self._engine.tokens_of(adapter)
        text = self._made.get(tokens)
        if text is None:
            prompts = self._prompts
            if tokens.tokenizer is not self._engine.tokens.tokenizer:
                prompts = prompts.with_tokenizer(tokens.tokenizer)
            text = self._made[tokens] = Text(
                prompts,
                MarkerTokens(tokens.tokenizer),
                GrammarCompiler(tokens.tokenizer, tokens.rows, tokens.ends),
                TokenBytes(tokens.vocabulary),
            )
        return text
