"""Biases, penalties, masks and log probabilities, for each sequence of a batch its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.engine import penalties
from nybble.engine import sampler as sampler_module
from nybble.engine.request import (
    NotANumberError,
    NothingAllowedError,
    ParameterError,
    SamplingParams,
)
from nybble.engine.sampler import PendingSample, SequenceSampler, sample
from nybble.kernels import reference


def greedy(prompt: tuple[int, ...] = (), **options: object) -> SequenceSampler:
    return SequenceSampler(SamplingParams(temperature=0, **options), prompt)  # type: ignore[arg-type]


def tokens(
    logits: list[list[float]],
    samplers: list[SequenceSampler],
    allowed: list[Tensor | None] | None = None,
) -> list[int]:
    return [token for token, _ in sample(reference, torch.tensor(logits), samplers, allowed)]


def test_each_row_has_its_own_bias_and_mask() -> None:
    rows = [[1.0, 3.0, 2.0]] * 3
    samplers = [greedy(), greedy(logit_bias={0: 5.0, 2: -1.0}), greedy()]
    masks = [None, None, torch.tensor([True, False, True])]
    assert tokens(rows, samplers, masks) == [1, 0, 2]


def test_a_mask_overrules_a_bias() -> None:
    guided = greedy(logit_bias={1: 100.0})
    assert tokens([[0.0, 0.0]], [guided], [torch.tensor([True, False])]) == [0]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    rows = [[1.0, 1.1], [1.0, 1.1], [-1.1, -1.0]]
    repeated = [
        greedy((1,), repetition_penalty=2.0),
        greedy((1,), presence_penalty=1.0),
        greedy((1,), repetition_penalty=2.0),
    ]
    assert tokens(rows, repeated) == [0, 1, 0]


def penalized(logits: Tensor, prompt: list[int], output: list[int], p: SamplingParams) -> Tensor:
    """As the definitions of the penalties say it, over the whole vocabulary."""
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(logits))
    seen = counts > 0
    repeated = seen.index_fill(0, torch.tensor(prompt, dtype=torch.int64), True)
    factor = torch.where(repeated, p.repetition_penalty, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - p.presence_penalty * seen - p.frequency_penalty * counts


def test_every_row_is_penalized_by_its_own_tokens_alone() -> None:
    """Over a text long enough for tokens to come again and for new ones to come."""
    torch.manual_seed(0)
    prompts = [[3, 3, 7], [], list(range(40)), [5]]
    options: list[dict[str, float]] = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25},
        {},
        {"repetition_penalty": 0.5, "frequency_penalty": -0.5},
    ]
    params = [SamplingParams(temperature=0, **each) for each in options]  # type: ignore[arg-type]
    samplers = [SequenceSampler(p, tuple(ids)) for p, ids in zip(params, prompts, strict=True)]
    outputs: list[list[int]] = [[] for _ in params]
    for _ in range(60):
        logits = torch.randn(4, 50)
        expected = [
            penalized(row, *each)
            for row, *each in zip(logits, prompts, outputs, params, strict=True)
        ]
        drawn = sample(reference, logits, samplers)
        assert torch.equal(logits, torch.stack(expected))
        for output, (token, _) in zip(outputs, drawn, strict=True):
            output.append(token)


def test_frequency_grows_with_every_occurrence_and_presence_does_not() -> None:
    frequent, present = greedy(frequency_penalty=0.4), greedy(presence_penalty=0.4)
    drawn = [tokens([[1.0, 0.0], [1.0, 0.0]], [frequent, present]) for _ in range(4)]
    assert [row[0] for row in drawn] == [0, 0, 0, 1]
    assert [row[1] for row in drawn] == [0, 0, 0, 0]


def test_logprobs_come_before_penalties_and_only_where_asked() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    expected = logits.log_softmax(-1)
    asked = [greedy(logprobs=2, logit_bias={0: 9.0}), greedy(), greedy(logprobs=0)]
    (first, report), (_, none), (_, bare) = sample(reference, logits, asked)
    assert first == 0
    assert none is None
    assert report is not None
    assert report.token_id == 0
    assert report.logprob == float(expected[0, 0])
    assert report.top == ((1, float(expected[0, 1])), (2, float(expected[0, 2])))
    assert bare is not None
    assert bare.top == ()


@pytest.mark.parametrize("company", [None, 0, 1, 5, 20])
def test_the_likeliest_of_equals_are_the_same_in_any_company(company: int | None) -> None:
    logits = torch.zeros(2, 400)
    asked = greedy(logprobs=3)
    (_, alone), *_ = sample(reference, logits[:1].clone(), [asked])
    (_, found), _ = sample(reference, logits, [greedy(logprobs=3), greedy(logprobs=company)])
    assert found == alone


def test_a_seed_draws_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 400)

    def drawn(company: int) -> list[int]:
        seeded = SequenceSampler(SamplingParams(temperature=1.2, top_p=0.9, seed=5), ())
        others = [SequenceSampler(SamplingParams(), ()) for _ in range(company)]
        found = []
        for step in logits:
            rows = torch.stack([torch.randn(400) for _ in others] + [step])
            found.append(sample(reference, rows, [*others, seeded])[-1][0])
        return found

    assert drawn(0) == drawn(3)


@pytest.mark.parametrize("part", ["sample_tokens", "_to_host", "_report", "penalize"])
def test_a_step_that_ran_out_of_memory_shifts_no_random_numbers(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The step is computed again; a seed still gives the tokens it gives without the failure."""

    def drawn(failing: set[int]) -> list[int]:
        torch.manual_seed(0)
        params = SamplingParams(seed=3, presence_penalty=0.5, logprobs=1)
        samplers = [SequenceSampler(params, ()), SequenceSampler(params, (1,))]
        found: list[int] = []
        for step in range(8):
            logits = torch.randn(2, 50)
            if step in failing:
                with monkeypatch.context() as patch:
                    patch.setattr(
                        reference if part in vars(reference) else sampler_module, part, no_memory
                    )
                    with pytest.raises(MemoryError):
                        sample(reference, logits.clone(), samplers)
            found += [token for token, _ in sample(reference, logits, samplers)]
        return found

    def no_memory(*_: object) -> None:
        raise MemoryError

    assert drawn({0, 3, 4}) == drawn(set())


def test_a_penalty_knows_the_prompt_after_a_step_that_ran_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    penalized = greedy((1,), repetition_penalty=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(penalties, "send", no_memory)
        with pytest.raises(MemoryError):
            tokens([[1.0, 1.1]], [penalized])
    assert tokens([[1.0, 1.1]], [penalized]) == [0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38, 1e-6])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_that_no_logit_can_be_divided_by_takes_the_likeliest(
    temperature: float, truncation: dict[str, Any]
) -> None:
    params = SamplingParams(temperature=temperature, **truncation)
    logits = torch.tensor([[3.0, 900.0, -900.0, 899.9, float("-inf"), 0.0, 0.0]])
    assert [token for token, _ in sample(reference, logits, [SequenceSampler(params, ())])] == [1]


@pytest.mark.parametrize("penalty", [0.01, 100])
def test_the_strongest_penalties_leave_logits_that_can_be_drawn_from(penalty: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, temperature=1e-38, top_k=2)
    sampler = SequenceSampler(params, (0, 1))
    token = {0.01: 0, 100: 2}[penalty]
    assert [
        found for found, _ in sample(reference, torch.tensor([[900.0, 1.0, 10.0]]), [sampler])
    ] == [token]


def test_a_penalty_that_would_make_logits_infinite_is_refused() -> None:
    with pytest.raises(ParameterError, match="repetition_penalty is 1e-38, expected"):
        SamplingParams(repetition_penalty=1e-38)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 1}, {"top_p": 0.5}])
def test_a_row_that_is_no_number_is_an_error_and_the_others_are_drawn(
    options: dict[str, Any],
) -> None:
    rows = torch.tensor([[0.0, 9.0], [1.0, float("nan")], [float("-inf")] * 2, [99.0, 0.0]])
    samplers = [SequenceSampler(SamplingParams(**options, seed=0), ()) for _ in rows]
    first, *broken, last = PendingSample(reference, rows, samplers).result()
    assert (first, last) == ((1, None), (0, None))
    assert [type(each) for each in broken] == [NotANumberError] * 2


def restricted(**options: Any) -> SequenceSampler:
    ends, words = options.pop("ends", frozenset()), options.pop("words", ())
    params = SamplingParams(temperature=0, **options)
    return SequenceSampler(params, (), ends=ends, bad_words=words)


def test_no_end_comes_before_min_tokens() -> None:
    sampler = restricted(min_tokens=2, ends=frozenset({2}))
    assert [tokens([[0.0, 1.0, 2.0]], [sampler])[0] for _ in range(4)] == [1, 1, 2, 2]


def test_a_grammar_that_is_complete_ends_before_min_tokens() -> None:
    """Else nothing at all could follow."""
    complete, open_ = torch.tensor([False, False, True]), torch.tensor([True, False, True])
    samplers = [restricted(min_tokens=2, ends=frozenset({2})) for _ in range(2)]
    drawn = sample(reference, torch.tensor([[0.0, 1.0, 2.0]] * 2), samplers, [complete, open_])
    assert [token for token, _ in drawn] == [2, 0]


def test_a_bad_word_is_kept_from_its_last_token_and_only_after_the_others() -> None:
    sampler = restricted(words=((2, 1), (0,)))
    rows = [[9.0, 1.0, 0.0], [9.0, 0.0, 2.0], [9.0, 5.0, 0.0], [9.0, 5.0, 0.0]]
    assert [tokens([row], [sampler])[0] for row in rows] == [1, 2, 2, 2]


def test_only_allowed_tokens_come_beside_rows_where_all_may() -> None:
    rows = [[0.0, 1.0, 2.0]] * 2
    assert tokens(rows, [restricted(allowed_token_ids=(0, 1)), greedy()]) == [1, 2]


def test_what_excludes_every_token_is_told_from_what_is_no_number() -> None:
    rows = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("nan"), 1.0]])
    contradicting = restricted(allowed_token_ids=(0,), words=((0,),))
    broken = restricted(allowed_token_ids=(0,))
    found = PendingSample(reference, rows, [contradicting, broken, greedy()]).result()
    assert [type(each) for each in found] == [NothingAllowedError, NotANumberError, NotANumberError]


def test_named_tokens_are_reported_instead_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 3)
    expected = logits[0].log_softmax(-1).tolist()
    asked = [
        greedy(logprobs=1, logprob_token_ids=(2, 0)),
        greedy(logprobs=1),
        greedy(logprobs=0, logprob_token_ids=(0,)),
    ]
    tops = [report.top for _, report in sample(reference, logits, asked) if report is not None]
    assert [[token for token, _ in top] for top in tops] == [[2, 0], [1], [0]]
    for token, value in (pair for top in tops for pair in top):
        assert value == pytest.approx(expected[token])


@pytest.mark.parametrize(
    "options",
    [
        {"min_tokens": -1},
        {"min_tokens": 3, "max_tokens": 2},
        {"bad_words": (" ",)},
        {"allowed_token_ids": ()},
        {"logprob_token_ids": (1,)},
    ],
)
def test_a_restriction_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**options)
    assert caught.value.parameter == next(iter(options))


def test_a_bias_out_of_range_is_named() -> None:
    with pytest.raises(ParameterError, match="token 7 is 101"):
        SamplingParams(logit_bias={5: 1.0, 7: 101.0})
