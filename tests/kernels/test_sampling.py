"""Tokens are drawn from what the parameters leave, alike by the reference and the GPU kernel.

On a machine without a GPU the kernel runs through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.reference import TokenChoice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gpu(logits: Tensor, choices: list[TokenChoice]) -> list[int]:
    sampling = pytest.importorskip("nybble.kernels.triton.sampling")
    return sampling.sample_tokens(logits.to(DEVICE), choices).tolist()


def plain(logits: Tensor, choices: list[TokenChoice]) -> list[int]:
    return reference.sample_tokens(logits, choices).tolist()


both = pytest.mark.parametrize("sample", [plain, gpu])
Sample = Callable[[Tensor, list[TokenChoice]], list[int]]


def logits_of(probs: list[float]) -> Tensor:
    return torch.tensor([probs]).log()


@both
def test_temperature_zero_takes_the_first_of_the_largest(sample: Sample) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [float("-inf"), -5.0, -6.0, -7.0]])
    greedy = TokenChoice(0.0, 2, 0.5, 0.1, 0.9)
    assert sample(logits, [greedy, greedy]) == [1, 1]


@both
@pytest.mark.parametrize(
    ("choice", "left"),
    [
        (TokenChoice(1.0, 0, 1.0, 0.0, 0.0), {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (TokenChoice(1.0, 2, 1.0, 0.0, 0.0), {1: 0.4, 3: 0.3}),
        (TokenChoice(1.0, 0, 0.6, 0.0, 0.0), {1: 0.4, 3: 0.3}),
        (TokenChoice(1.0, 0, 0.75, 0.0, 0.0), {1: 0.4, 2: 0.2, 3: 0.3}),
        (TokenChoice(1.0, 3, 0.7, 0.0, 0.0), {1: 0.4, 3: 0.3}),  # 0.7 of the 0.9 that is left
        (TokenChoice(1.0, 0, 1.0, 0.6, 0.0), {1: 0.4, 3: 0.3}),
        (TokenChoice(0.5, 0, 1.0, 0.0, 0.0), {0: 0.01, 1: 0.16, 2: 0.04, 3: 0.09}),
        (TokenChoice(1.0, 9, 1e-9, 0.0, 0.0), {1: 1.0}),
    ],
)
def test_a_token_is_drawn_as_often_as_its_share_of_what_is_left(
    sample: Sample, choice: TokenChoice, left: dict[int, float]
) -> None:
    draws = 400
    choices = [choice._replace(uniform=(draw + 0.5) / draws) for draw in range(draws)]
    if sample is gpu and DEVICE == "cpu":
        draws, choices = 20, choices[10::20]  # the interpreter is slow
    found = sample(logits_of([0.1, 0.4, 0.2, 0.3]).expand(draws, 4), choices)
    assert set(found) == set(left)
    for token, weight in left.items():
        share = weight / sum(left.values())
        assert abs(found.count(token) / draws - share) <= 1.5 / draws


@both
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(sample: Sample, uniform: float) -> None:
    logits = torch.full((1, 3000), float("-inf"))
    logits[0, [700, 2500]] = torch.tensor([0.0, 1.0])
    expected = 700 if uniform == 0 else 2500
    assert sample(logits, [TokenChoice(1.0, 0, 1.0, 0.0, uniform)]) == [expected]


@both
def test_entries_equal_to_the_last_one_kept_are_kept(sample: Sample) -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).expand(12, 4)
    found = sample(logits, [TokenChoice(1.0, 2, 1.0, 0.0, (i + 0.5) / 12) for i in range(12)])
    assert set(found) == {0, 1, 2}


@given(
    seed=st.integers(0, 999),
    vocab=st.sampled_from([5, 1000, 5000]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 40, 4999]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 0.05]),
    uniform=st.floats(0, 1, exclude_max=True),
)
@example(0, 1000, 0.3, 0, 1.0, 0.0, 1 - 2.0**-53)
@settings(max_examples=20, deadline=None)
def test_the_kernel_draws_what_the_reference_draws(
    seed: int,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> None:
    torch.manual_seed(seed)
    logits = 4 * torch.randn(1, vocab).bfloat16().float()  # with ties, as models have them
    choice = TokenChoice(temperature, top_k, top_p, min_p, uniform)
    (found,), (expected,) = gpu(logits, [choice]), plain(logits, [choice])
    if found != expected:
        # A number at the border of two tokens may fall either way by rounding, and one next to 1
        # anywhere in a tail that weighs nothing.
        (low,) = plain(logits, [choice._replace(uniform=max(0.0, uniform - 1e-6))])
        if uniform + 1e-6 < 1:
            (high,) = plain(logits, [choice._replace(uniform=uniform + 1e-6)])
        else:
            high = vocab - 1
        assert low <= found <= high


def test_a_row_is_drawn_alike_in_any_company() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 3000)
    choices = [TokenChoice(t, 50 * (t > 1), 0.9, 0.0, 0.37) for t in (0.0, 0.7, 1.5, 1.0, 2.0, 0.0)]
    for sample in (plain, gpu):
        together = sample(logits, choices)
        alone = [sample(logits[i : i + 1], [choice])[0] for i, choice in enumerate(choices)]
        assert alone == together
