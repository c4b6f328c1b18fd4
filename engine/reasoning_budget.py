"""Ends the reasoning of a model after a number of tokens, by forcing the marker that closes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.engine.request import DisallowedTokenError, Guide
from nybble.engine.vocabulary import Vocabulary


@dataclass(frozen=True)
class ReasoningLimit:
    """How reasoning begins and ends, and how many tokens it may have.

    tokens: most tokens between the markers.
    open, close: the texts of the markers.
    closing: token ids that end reasoning once it has had its tokens.
    inside: whether the output begins inside reasoning.
    barred: a token that may not follow ``closing``, because it would begin more reasoning.
    """

    tokens: int
    open: str
    close: str
    closing: tuple[int, ...]
    inside: bool
    barred: int | None = None


class BudgetGuide:
    """A guide (see :class:`nybble.engine.request.Guide`) that enforces a limit, around another.

    The markers are found in the spelling of the tokens, because a model may write a marker in
    other tokens than the tokenizer does.
    """

    def __init__(
        self, limit: ReasoningLimit, vocabulary: Vocabulary, vocab: int, inner: Guide | None
    ) -> None:
        """vocab: how many logits the model has. inner: what else restricts the output."""
        self._limit = limit
        self._vocabulary = vocabulary
        self._vocab = vocab
        self._inner = inner
        self._open, self._close = limit.open.encode(), limit.close.encode()
        self._spelt = b""  # the end of the output
        self._inside = limit.inside
        self._used = 0
        self._forced = limit.closing if limit.inside and limit.tokens == 0 else ()
        self._barred = False

    def fork(self) -> BudgetGuide:
        inner = None if self._inner is None else self._inner.fork()
        other = BudgetGuide(self._limit, self._vocabulary, self._vocab, inner)
        other._spelt, other._inside, other._used = self._spelt, self._inside, self._used
        other._forced, other._barred = self._forced, self._barred
        return other

    def allowed(self) -> Tensor:
        if self._inner is None:
            found = torch.ones(self._vocab, dtype=torch.bool)
        else:
            found = self._inner.allowed()
        # A grammar may ask for the rest of a character first.
        if self._forced and found[self._forced[0]]:
            only = torch.zeros(self._vocab, dtype=torch.bool)
            only[self._forced[0]] = True
            return only
        if self._barred and self._limit.barred is not None:
            found = found.clone()
            found[self._limit.barred] = False
        return found

    def accept(self, token: int) -> bool:
        if self._forced and token != self._forced[0] and self.allowed().sum() == 1:
            raise DisallowedTokenError("reasoning went on after its thinking_token_budget")
        complete = self._inner is not None and self._inner.accept(token)
        self._advance(token)
        return complete

    def accepts(self, tokens: tuple[int, ...]) -> int:
        guide = self.fork()
        for count, token in enumerate(tokens):
            if not guide.allowed()[token]:
                return count
            if guide.accept(token):
                return count + 1
        return len(tokens)

    def allowed_along(self, tokens: tuple[int, ...]) -> list[Tensor]:
        guide, found = self.fork(), [self.allowed()]
        for token in tokens:
            guide.accept(token)
            found.append(guide.allowed())
        return found

    def _advance(self, token: int) -> None:
        longest = max(len(self._open), len(self._close))
        spelling = self._vocabulary.spelling(token)
        self._spelt = (self._spelt + spelling)[-(longest + len(spelling)) :]
        self._barred = False
        if self._forced and token == self._forced[0]:
            self._forced = self._forced[1:]
            if not self._forced:
                self._inside, self._barred, self._spelt = False, True, b""
        elif self._inside:
            self._used += 1
            if self._close in self._spelt:
                self._inside, self._spelt = False, b""
        elif self._open in self._spelt:
            self._inside, self._spelt = True, b""
        if self._inside and not self._forced and self._used >= self._limit.tokens:
            self._forced = self._limit.closing
