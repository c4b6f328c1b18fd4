"""Reasoning ends after its tokens: the closing marker is forced, whatever guides the rest."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from nybble.engine import (
    BudgetGuide,
    DisallowedTokenError,
    GrammarCompiler,
    ReasoningLimit,
    Vocabulary,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> Any:
    """A vocabulary without the markers: they are several tokens each."""
    return AutoTokenizer.from_pretrained(tiny_model())


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def guide_of(tokenizer: Any, tokens: int, *, inside: bool, inner: Any = None) -> BudgetGuide:
    limit = ReasoningLimit(tokens, "<think>", "</think>", ids(tokenizer, "</think>"), inside=inside)
    return BudgetGuide(limit, Vocabulary(tokenizer.backend_tokenizer), len(tokenizer), inner)


def forced(guide: Any) -> list[int]:
    """The tokens that must come now, which are accepted."""
    found = []
    while guide.allowed().sum() == 1:
        found.append(int(guide.allowed().nonzero()))
        guide.accept(found[-1])
    return found


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_marker_is_forced_after_so_many_tokens(
    tokenizer: Any, inside: bool, tokens: int
) -> None:
    guide = guide_of(tokenizer, tokens, inside=inside)
    if not inside:
        assert guide.allowed().all()
        for token in ids(tokenizer, "<think>"):
            guide.accept(token)
    for _ in range(tokens):
        assert guide.allowed().all()
        guide.accept(ids(tokenizer, "a")[0])
    assert tuple(forced(guide)) == ids(tokenizer, "</think>")
    # Then everything is free again.
    for token in ids(tokenizer, "the answer is long"):
        assert guide.allowed().all()
        assert not guide.accept(token)


def test_reasoning_that_ends_by_itself_is_let_alone(tokenizer: Any) -> None:
    guide = guide_of(tokenizer, 20, inside=True)
    for token in ids(tokenizer, "ab</think>" + 30 * "c"):
        assert guide.allowed().all()
        guide.accept(token)


def test_an_answer_without_reasoning_has_no_limit(tokenizer: Any) -> None:
    guide = guide_of(tokenizer, 0, inside=False)
    for token in ids(tokenizer, "no thoughts at all"):
        assert guide.allowed().all()
        guide.accept(token)


def test_what_follows_is_guided_by_the_grammar(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    lead = 'start: thought @answer\nthought[suffix="</think>"]: /(.|\\n)*/'
    inner = compiler.after(lead).choice(["yes", "no"])
    guide = guide_of(tokenizer, 3, inside=True, inner=inner)
    for token in ids(tokenizer, "a")[:1] * 3:
        guide.accept(token)
    forced(guide)
    allowed = guide.allowed()
    assert allowed[ids(tokenizer, "y")[0]]
    assert not allowed[ids(tokenizer, "a")[0]]


def test_a_character_that_has_begun_is_ended_first(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    lead = 'start: thought @answer\nthought[suffix="</think>"]: /(.|\\n)*/'
    inner = compiler.after(lead).choice(["yes", "no"])
    guide = guide_of(tokenizer, 1, inside=True, inner=inner)
    first, last = (tokenizer.convert_tokens_to_ids(each) for each in "Ã©")  # the bytes of é
    guide.accept(first)
    assert guide.allowed()[last]
    guide.accept(last)
    assert tuple(forced(guide)[:8]) == ids(tokenizer, "</think>")


def test_drafts_follow_the_limit(tokenizer: Any) -> None:
    guide = guide_of(tokenizer, 2, inside=True)
    a, close = ids(tokenizer, "a")[0], ids(tokenizer, "</think>")
    assert guide.accepts((a, a, a)) == 2
    assert guide.accepts((a, a, *close, a)) == len(close) + 3
    masks = guide.allowed_along((a, a))
    assert [bool(mask.all()) for mask in masks] == [True, True, False]
    assert guide.allowed().all()  # it has not advanced
    guide.accept(a)
    guide.accept(a)
    with pytest.raises(DisallowedTokenError, match="thinking_token_budget"):
        guide.accept(a)


def test_a_fork_goes_its_own_way(tokenizer: Any) -> None:
    guide = guide_of(tokenizer, 1, inside=True)
    other = guide.fork()
    guide.accept(ids(tokenizer, "a")[0])
    assert guide.allowed().sum() == 1
    assert other.allowed().all()
