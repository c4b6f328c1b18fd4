"""Guided decoding: a grammar decides which tokens may come next.

The automaton is llguidance's: built in about a millisecond, it walks the vocabulary at every step
instead of enumerating states ahead, so a mask costs tens to hundreds of microseconds.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from nybble.engine.json_schema import Omission, Schema, expressible
from nybble.engine.request import DisallowedTokenError, GuideError
from nybble.loaders.adapter_tokens import TextTokenizer

# Imported where a guide is built: the engine runs on machines that have torch and little else.
if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Characters of a grammar, as the library is given it.
MAX_GRAMMAR = 256 << 10
# Enough for a line break and its indentation; without a limit a model may write spaces for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{1,40}"}
# The library, where only one text may follow, allows only the tokens that the tokenizer makes of
# it. With this header any tokens may spell it.
_ANY_SPELLING = '%llguidance {"no_forcing": true}\n'
# How the library says that no token may come next.
_NOTHING_FOLLOWS = "NoExtensionBias"
_MARKER = b"\xff"
# A character that no token has beside others.
_LEAD = "\x02"
# In Lark's syntax, what is between quotes and slashes is text; other names may be those of tokens.
# What is not closed matches too, or looking for its end again and again would take quadratic time.
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"?|/(?:[^/\\\n]|\\.)+/?')


@dataclass(frozen=True)
class StructuralTag:
    """``begin``, JSON by ``schema``, ``end``; once ``trigger``, its first part, is in the text."""

    trigger: str
    begin: str
    schema: Mapping[str, Any]
    end: str


class GrammarGuide:
    """One sequence's place in a grammar (see :class:`nybble.engine.request.Guide`).

    parameter: the request's field that has the grammar, for errors.
    """

    def __init__(self, matcher: LLMatcher, parameter: str | None = None) -> None:
        self.parameter = parameter
        self._matcher = matcher
        self._offered: Tensor | None = None  # what was allowed last, until a token is accepted

    def fork(self) -> GrammarGuide:
        return GrammarGuide(self._matcher.deep_copy(), self.parameter)

    def allowed(self) -> Tensor:
        # One byte per token: 0 or 200. In an error state the mask means nothing; accept() says so.
        weights = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)
        self._offered = torch.from_numpy(weights != 0)
        return self._offered

    def accept(self, token: int) -> bool:
        offered, self._offered = self._offered, None
        # If nothing may follow, computing the mask is an error, after which only an end is taken.
        broken = self._matcher.is_error()
        if not broken and offered is not None and not offered[token]:
            raise DisallowedTokenError(f"token {token} was excluded by the request's grammar")
        if broken or not self._matcher.consume_token(token):
            reason = _first_line(self._matcher.get_error())
            raise GuideError(f"guided decoding failed: {reason}", self.parameter)
        return bool(self._matcher.is_stopped())

    def accepts(self, tokens: tuple[int, ...]) -> int:
        return int(self._matcher.validate_tokens(list(tokens)))

    def allowed_along(self, tokens: tuple[int, ...]) -> list[Tensor]:
        guide, found = self.fork(), [self.allowed()]
        for token in tokens:
            guide.accept(token)
            found.append(guide.allowed())
        return found


class GrammarCompiler:
    """Builds guides for one vocabulary; may be used from any thread."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        vocab: int,
        eos_token_ids: frozenset[int],
        *,
        base: GrammarCompiler | None = None,
    ) -> None:
        """base: of a tokenizer that has the same tokens but for some that were added to it, which
        makes the vocabulary quicker to read."""
        self._backend = tokenizer.backend_tokenizer
        known = None if base is None else base._vocabulary
        self._vocabulary: _LazyVocabulary = _LazyVocabulary(tokenizer, vocab, eos_token_ids, known)
        self._lead = ""

    def read_vocabulary(self) -> None:
        """Do now what the first guide needs. Raises ValueError for a tokenizer of another kind."""
        self._vocabulary.get()

    def after(self, lead: str) -> GrammarCompiler:
        """A compiler whose guides begin with something else.

        lead: a grammar in Lark's syntax of what comes first; it calls the rest ``@answer``.
        """
        compiler = copy(self)
        compiler._lead = lead
        return compiler

    def json_schema(self, schema: Schema, omissions: list[Omission] | None = None) -> GrammarGuide:
        """JSON that is valid under ``schema``. See :func:`grammar_schema` for ``omissions``."""
        from llguidance import LLMatcher

        return self._guide(
            LLMatcher.grammar_from_json_schema(json.dumps(grammar_schema(schema, omissions)))
        )

    def regex(self, pattern: str) -> GrammarGuide:
        """Text that matches all of ``pattern`` (Rust's syntax). Raises ValueError."""
        from llguidance import LLMatcher

        return self._guide(LLMatcher.grammar_from_regex(pattern))

    def choice(self, choices: Sequence[str]) -> GrammarGuide:
        """One of ``choices``."""
        rules = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return self._lark(f"start: {rules}")

    def grammar(self, text: str) -> GrammarGuide:
        """Text of a grammar in Lark's syntax, as llguidance reads it, or in GBNF, llama.cpp's.

        Raises ValueError.
        """
        from llguidance.gbnf_to_lark import any_to_lark

        _require_size(text)
        try:
            lark = any_to_lark(text)
        except Exception as error:  # its errors have no class in common but this
            raise ValueError(str(error)) from None
        return self._lark(lark)

    def _lark(self, grammar: str) -> GrammarGuide:
        from llguidance import LLMatcher

        return self._guide(LLMatcher.grammar_from_lark(grammar))

    def structural_tags(self, tags: Sequence[StructuralTag]) -> GrammarGuide:
        """Any text, in which each trigger begins one of the tags. Raises ValueError."""
        from llguidance import StructTag

        # A trigger that is a token of its own is not found in text: the grammar names the token.
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        special = {tag.trigger in added for tag in tags}
        if len(special) > 1:
            raise ValueError("some triggers are special tokens and others are not")
        rules = [
            StructTag(
                trigger=tag.trigger,
                begin=tag.begin,
                grammar=grammar_schema(dict(tag.schema)),
                end=tag.end,
            )
            for tag in tags
        ]
        return self._guide(StructTag.to_grammar(rules, assume_special=special == {True}))

    def _guide(self, grammar: str) -> GrammarGuide:
        from llguidance import LLMatcher

        _require_size(grammar)
        vocabulary = self._vocabulary.get()
        lead = self._lead
        if self._vocabulary.mentions_special(_literals(grammar)):
            # The tokenizer makes the special token of such a text, which is not the text.
            lead = _ANY_SPELLING + (lead or "start: @answer")
        if lead:
            grammar = _behind(lead, grammar)
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(_first_line(matcher.get_error()))
        # A grammar of which no text can begin compiles, and so does one that is too large; its
        # first mask is what shows it. What is too large is reported by the mask after that.
        for _ in range(2):
            started = matcher.deep_copy()
            started.compute_logit_bias()
            if started.is_error():
                error = started.get_error()
                raise ValueError(
                    "nothing matches it: no text can begin as it says"
                    if error.startswith(_NOTHING_FOLLOWS)
                    else f"it is too large: {_first_line(error)}"
                )
        return GrammarGuide(matcher)


class _LazyVocabulary:
    """A vocabulary as the library reads it. That takes seconds, so it is done once it is needed."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        size: int,
        eos_token_ids: frozenset[int],
        base: _LazyVocabulary | None,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._size = size
        self._eos_token_ids = sorted(eos_token_ids)
        self._base = base
        self._lock = threading.Lock()
        self._read: LLTokenizer | None = None

    def get(self) -> LLTokenizer:
        with self._lock:
            if self._read is None:
                from llguidance import LLTokenizer

                if self._base is None or not self._eos_token_ids:
                    self._read = LLTokenizer(
                        self._backend.to_str(),
                        n_vocab=self._size,
                        eos_token=self._eos_token_ids or None,
                    )
                else:
                    # No other thread runs while the library works: so it is given bytes, and not
                    # JSON, from which it would have to make the same; in two pieces.
                    given: Any = _Extended(self._backend, self._base, self._size)
                    given.eos_token_id = self._eos_token_ids[0]
                    plain = LLTokenizer(given, eos_token=self._eos_token_ids, slices=[])
                    self._read = plain.with_slices(plain.general_slices())
            return self._read

    @cached_property
    def spellings(self) -> list[bytes]:
        """The bytes of each token, as the library is given them."""
        read = self.get()
        found = [read.decode_bytes([number]) for number in range(self._backend_size)]
        # Inside the library this byte begins special tokens: it takes the token that is nothing
        # else for one without a text.
        return [
            _MARKER if not text and read.is_special_token(number) else text
            for number, text in enumerate(found)
        ]

    @property
    def _backend_size(self) -> int:
        known = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        return min(known, self._size)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The texts of tokens which the library does not take for text, as :func:`_literals` has
        them, and as JSON has them too."""
        read, added = self.get(), self._backend.get_added_tokens_decoder()
        texts = [t.content for number, t in added.items() if read.is_special_token(number)]
        return tuple(
            {_plain(each) for text in texts for each in (text, json.dumps(text)[1:-1])} - {""}
        )

    def mentions_special(self, literals: str) -> bool:
        """Whether the text of a special token is in a grammar's literals."""
        return any(text in literals for text in self._special)


class _Extended:
    """A tokenizer as the library takes it from Python: a base's tokens, and some more."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, backend: Tokenizer, base: _LazyVocabulary, size: int) -> None:
        """size: one more than the highest token id. Tokens that there are not have no bytes."""
        self._backend = backend
        read, known = base.get(), len(base.spellings)
        added = {n: t for n, t in backend.get_added_tokens_decoder().items() if known <= n < size}
        self.tokens = [*base.spellings, *[b""] * (size - known)][:size]
        special = {number for number in range(min(known, size)) if read.is_special_token(number)}
        if added:
            # Their bytes, and which of them are control tokens, the library says of a tokenizer
            # that has no others.
            alone = Tokenizer(BPE())
            alone.decoder = backend.decoder
            alone.add_tokens(list(added.values()))
            asked = type(read)(alone.to_str(), eos_token=0, slices=[])
            for place, number in enumerate(added):
                self.tokens[number] = asked.decode_bytes([place])
                if asked.is_special_token(place):
                    special.add(number)
        self.special_token_ids = [n for n in sorted(special) if self.tokens[n] != _MARKER]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text, as of one that goes on: without a space put before it."""
        lead = self._backend.encode(_LEAD, add_special_tokens=False).ids
        found: list[int] = self._backend.encode(_LEAD + text, add_special_tokens=False).ids
        return found[len(lead) :]


def _literals(grammar: str) -> str:
    """The text in a grammar, as the library writes it, that may be text of an answer; plain."""
    if not grammar.lstrip().startswith("{"):
        return _plain("\n".join(_LITERAL.findall(grammar)))
    parts = (
        "\n".join(_LITERAL.findall(each["lark_grammar"]))
        if "lark_grammar" in each
        else json.dumps(each)
        for each in json.loads(grammar)["grammars"]
    )
    return _plain("\n".join(parts))


def _plain(text: str) -> str:
    """Without escapes: regular expressions, strings and JSON have them at different places."""
    return text.replace("\\", "")


def _behind(lead: str, grammar: str) -> str:
    """``grammar`` as the ``@answer`` of ``lead``. The library writes it as Lark's text or as
    JSON."""
    (answer,) = (
        json.loads(grammar)["grammars"]
        if grammar.lstrip().startswith("{")
        else [{"lark_grammar": grammar}]
    )
    return json.dumps({"grammars": [{"lark_grammar": lead}, {**answer, "name": "answer"}]})


def grammar_schema(schema: Schema, omissions: list[Omission] | None = None) -> dict[str, Any]:
    """``schema`` as a grammar's ``%json`` takes it, by itself or as one of several.

    omissions: gets what the grammar cannot express of it, which is left to the model. Without it
        ValueError is raised for the first.

    Raises ValueError if no value satisfies the schema.
    """
    expressed, omitted = expressible(schema, _schema_error)
    if omissions is not None:
        omissions += omitted
    elif omitted:
        raise ValueError(str(omitted[0]))
    return {**expressed, "x-guidance": JSON_OPTIONS}


def _schema_error(schema: dict[str, Any]) -> str | None:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    error = LLMatcher.validate_grammar(grammar)
    return _first_line(error) if error else None


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    # A regex's error shows the pattern first and says what is wrong in its last "error:" line.
    named = [line for line in lines if line.startswith("error:")]
    return (named or lines or ["no reason given"])[0]


def _require_size(grammar: str) -> None:
    if len(grammar) > MAX_GRAMMAR:
        raise ValueError(f"it has {len(grammar)} characters, more than {MAX_GRAMMAR}")
