"""Drafts come from what repeats, and no more of them are verified than pay."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from nybble.engine.ngram_drafter import Match, NgramDrafter, Ngrams
from nybble.engine.speculation import Acceptance, Speculation, StepCosts, draft_lengths


def test_a_draft_is_what_followed_the_newest_tokens_before() -> None:
    ngrams = Ngrams([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert ngrams.find(10) == Match((4, 5, 6, 9, 1, 2), 3), "three agree: up to six may follow"
    assert ngrams.find(2) == Match((4, 5), 3)
    ngrams.extend([7])
    assert ngrams.find(10) is None
    ngrams.extend([2, 3])
    assert ngrams.find(1) == Match((7,), 2), "the newest of two places where as many agree"


def test_the_place_where_most_tokens_agree_is_taken_before_the_newest() -> None:
    ngrams = Ngrams([8, 1, 2, 50, 9, 1, 2, 60, 8, 1, 2])
    assert ngrams.find(1) == Match((50,), 3)


def test_what_repeats_without_a_pause_goes_on() -> None:
    assert Ngrams([5, 5, 5, 5]).find(4) == Match((5, 5, 5, 5), 3)
    assert Ngrams([1, 2, 1, 2, 1, 2]).find(5) == Match((1, 2, 1, 2, 1), 4)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3]])
def test_nothing_is_drafted_if_nothing_repeats(tokens: list[int]) -> None:
    assert Ngrams(tokens).find(4) is None


def test_drafts_are_found_as_a_search_through_all_places_finds_them() -> None:
    chance = random.Random(0)
    found = 0
    for _ in range(300):
        tokens = [chance.randrange(4) for _ in range(chance.randint(0, 14))]
        ngrams = Ngrams(tokens[:3])
        ngrams.extend(tokens[3:])
        draft = ngrams.find(1)
        matches = [
            (length, end)
            for end in range(2, len(tokens))
            for length in range(2, end + 1)
            if tokens[end - length : end] == tokens[-length:]
        ]
        expected = Match((tokens[max(matches)[1]],), max(matches)[0]) if matches else None
        assert draft == expected
        found += bool(matches)
    assert found > 50


def test_costs_are_interpolated_between_steps_that_were_measured() -> None:
    costs = StepCosts()
    assert costs.of(3) is None
    costs.observe(1, 0.010)
    assert costs.of(8) == 0.010, "what was never tried is tried"
    costs.observe(5, 0.030)
    assert costs.of(3) == pytest.approx(0.020)
    assert costs.of(9) == pytest.approx(0.030)


def test_steps_that_grow_with_their_contexts_grow_in_every_estimate() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.observe(1, 0.010)
        costs.observe(5, 0.020)
    for _ in range(100):
        costs.observe(5, 0.040)
    assert costs.of(5) == pytest.approx(0.040, rel=0.01)
    assert costs.of(1) > 0.012  # type: ignore[operator]


def test_one_step_that_was_held_up_changes_little() -> None:
    costs = StepCosts()
    for _ in range(10):
        costs.observe(1, 0.010)
    costs.observe(1, 10.0)
    assert costs.of(1) < 0.025  # type: ignore[operator]


def test_steps_that_take_turns_being_fast_and_slow_change_no_other_estimate() -> None:
    costs = StepCosts()
    costs.observe(1, 0.010)
    costs.observe(5, 0.020)
    for _ in range(1000):
        costs.observe(1, 0.015)
        costs.observe(1, 0.006)
    assert costs.of(5) == pytest.approx(0.020, rel=0.2)


def test_a_first_step_that_was_held_up_is_forgotten_with_the_second() -> None:
    costs = StepCosts()
    costs.observe(1, 0.010)
    costs.observe(5, 3.0)
    costs.observe(5, 0.014)
    assert costs.of(5) == pytest.approx(0.014)
    costs.observe(5, 0.007)
    assert costs.of(5) == pytest.approx(0.012, abs=0.001), "from then on little by little"


def test_a_step_that_was_measured_wrongly_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts of a text that repeats are all right, but the first step that verified one stood."""
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    decides = Speculation(NgramDrafter(), 8, adaptive=True)
    decides.observe(1, 0.010)
    decides.observe(9, 60.0)
    decides._without = 0.0  # the time from here on
    sequence = repeating()
    verified = []
    for _ in range(2000):
        ((draft, length),) = decides.propose(1, 1, {sequence: 99}, 99).values()
        verified.append(length)
        decides.observe_tokens(draft, length, [5] * (length + 1), sequence.acceptance)
        decides.observe(1 + length, 0.010 + 0.0005 * length)
    # A draft of eight may take as long as eight steps: half a hundredth of the time is one in 1600.
    first = next(step for step, length in enumerate(verified) if length)
    assert first == pytest.approx(200 * verified[first], abs=10)
    assert verified[-1] == verified[first]


def repeating() -> Any:
    """Stands in for a sequence that says one token again and again."""
    about = {"guide": None, "prediction": None, "prompt_token_ids": ()}
    request = type("Request", (), about)()
    fields = {"token_ids": [5] * 20, "acceptance": Acceptance(), "request": request}
    return type("Repeating", (), fields)()


def costs(**seconds: float) -> StepCosts:
    made = StepCosts()
    for rows, value in seconds.items():
        made.observe(int(rows.removeprefix("rows_")), value)
    return made


def falling(share: float, length: int) -> list[float]:
    """The chances of a draft each token of which is accepted with this share."""
    return [share**place for place in range(1, length + 1)]


def test_free_rows_take_every_draft_and_costly_ones_none() -> None:
    flat = costs(rows_1=0.010, rows_16=0.010)
    assert draft_lengths(flat, 1, 1, [falling(0.7, 8)], 99) == [8]
    proportional = costs(rows_1=0.010, rows_16=0.160)
    assert draft_lengths(proportional, 1, 1, [falling(0.99, 8)], 99) == [0]


def test_as_many_are_verified_as_make_the_most_tokens_a_second() -> None:
    half = costs(rows_1=0.010, rows_9=0.050)  # another row is half a step
    # Accepted with .8: 1 / 10, 1.8 / 15, 2.44 / 20, 2.952 / 25 tokens a millisecond …
    assert draft_lengths(half, 1, 1, [falling(0.8, 8)], 99) == [2]
    assert draft_lengths(half, 1, 1, [falling(0.4, 8)], 99) == [0]


def test_the_likelier_draft_comes_first() -> None:
    steps = costs(rows_2=0.010, rows_4=0.011, rows_5=0.050)
    assert draft_lengths(steps, 2, 2, [falling(0.3, 4), falling(0.9, 4)], 99) == [0, 2]


def test_tokens_that_other_sequences_get_anyway_count() -> None:
    # Seven of eight sequences have no draft, and wait for the eighth's: a row takes 8 % of the step
    # in which eight tokens are made, so that a draft token must be right more often than .6.
    steps = costs(rows_8=0.057, rows_16=0.0922)
    assert draft_lengths(steps, 8, 8, [[0.5]], 99) == [0]
    assert draft_lengths(steps, 8, 8, [[0.95]], 99) == [1]


def test_what_a_prompt_takes_of_a_step_is_neither_for_nor_against_drafts() -> None:
    # 100 rows of a prompt make the step ten times as long; a row still takes a fifth of the time in
    # which a token is decoded.
    steps = costs(rows_1=0.010, rows_2=0.012, rows_101=0.100, rows_102=0.102)
    for rows in (1, 101):
        assert draft_lengths(steps, rows, 1, [[0.15]], 99) == [0]
        assert draft_lengths(steps, rows, 1, [[0.3]], 99) == [1]


def speculation() -> Speculation:
    """With steps of which each further row takes a fifth of the first."""
    made = Speculation(NgramDrafter(), 8, adaptive=True)
    for rows in (1, 9):
        made.observe(rows, 0.008 + 0.002 * rows)
    return made


def test_matches_of_a_length_that_mostly_fail_are_not_verified_in_any_sequence() -> None:
    decides = speculation()
    short, long = Match((1, 2, 3, 4), agreeing=2).draft(), Match((1, 2, 3, 4), agreeing=20).draft()
    for _ in range(40):
        decides.observe_tokens(short, 0, [9], Acceptance())
        decides.observe_tokens(long, 4, [1, 2, 3, 4, 9], Acceptance())
    assert decides.lengths(1, 1, [(short, Acceptance())], 99) == [0]
    assert decides.lengths(1, 1, [(long, Acceptance())], 99) == [4]


def test_what_is_not_verified_teaches_too_so_that_drafts_come_back() -> None:
    decides, own = speculation(), Acceptance()
    draft = Match((1, 2, 3, 4), agreeing=3).draft()
    for _ in range(40):
        decides.observe_tokens(draft, 0, [9], own)
    assert decides.lengths(1, 1, [(draft, own)], 99) == [0]
    for _ in range(80):  # the first token alone is seen, and is what was sampled
        decides.observe_tokens(draft, 0, [1], own)
    assert decides.lengths(1, 1, [(draft, own)], 99)[0] > 0


def test_a_sequence_that_repeats_more_than_others_has_better_chances() -> None:
    decides, repeats = speculation(), Acceptance()
    draft = Match((1, 2), agreeing=3).draft()
    for number in range(60):
        decides.observe_tokens(draft, 0, [9], Acceptance())
        if number % 6 == 0:
            decides.observe_tokens(draft, 2, [1, 2, 9], repeats)
    assert decides.lengths(1, 1, [(draft, Acceptance())], 99) == [0]
    assert decides.lengths(1, 1, [(draft, repeats)], 99) == [2]


def test_drafts_of_which_less_comes_than_was_expected_are_verified_less() -> None:
    """Those are verified that promise most, and of such more is expected than comes."""
    decides, draft = speculation(), Match((1,), agreeing=20).draft()
    for _ in range(20):
        for _ in range(3):  # as if it had been thought not to pay
            decides.observe_tokens(draft, 0, [1], Acceptance())
        assert decides.lengths(1, 1, [(draft, Acceptance())], 99) == [1]
    for _ in range(40):
        for _ in range(3):
            decides.observe_tokens(draft, 0, [1], Acceptance())
        decides.observe_tokens(draft, 1, [9], Acceptance())
    assert decides.lengths(1, 1, [(draft, Acceptance())], 99) == [0]
    for _ in range(200):
        decides.observe_tokens(draft, 1, [1, 2], Acceptance())
    assert decides.lengths(1, 1, [(draft, Acceptance())], 99) == [1]


def test_a_prompts_rows_take_less_because_their_logits_are_not_computed() -> None:
    decides = Speculation(NgramDrafter(), 8, adaptive=True, prompt_row=0.75)
    assert decides.rows(32, 32) == 32
    assert decides.rows(402, 2) == 302
