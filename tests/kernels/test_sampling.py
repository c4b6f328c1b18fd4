"""Tokens are drawn from what the parameters leave, alike by the reference and the GPU kernel.

On a machine without a GPU the kernel runs through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.kernels import reference
from nybble.kernels.cpu.library import CpuLibrary, library
from nybble.kernels.reference import TokenChoice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gpu(logits: Tensor, choices: list[TokenChoice]) -> list[int]:
    sampling = pytest.importorskip("nybble.kernels.triton.sampling")
    return sampling.sample_tokens(logits.to(DEVICE), choices).tolist()


def plain(logits: Tensor, choices: list[TokenChoice]) -> list[int]:
    return reference.sample_tokens(logits, choices).tolist()


def cpu(logits: Tensor, choices: list[TokenChoice]) -> list[int]:
    kernels = library()
    if kernels is None:
        pytest.skip("no CPU kernels here")
    return kernels.sample_tokens(logits, choices).tolist()


@pytest.fixture
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 5,000 logits has four, of three tiles each, and two rows are a launch."""
    sampling = pytest.importorskip("nybble.kernels.triton.sampling")
    small = {"TILE": 512, "KEPT": 1024, "PROGRAMS": 4, "ALONE": 0, "ROWS": 2}
    for name, value in small.items():
        monkeypatch.setattr(sampling, name, value)


every = pytest.mark.parametrize("sample", [plain, gpu, cpu])
Sample = Callable[[Tensor, list[TokenChoice]], list[int]]


def logits_of(probs: list[float]) -> Tensor:
    return torch.tensor([probs]).log()


@every
def test_temperature_zero_takes_the_first_of_the_largest(sample: Sample) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [float("-inf"), -5.0, -6.0, -7.0]])
    greedy = TokenChoice(0.0, 2, 0.5, 0.1, 0.9)
    assert sample(logits, [greedy, greedy]) == [1, 1]


@every
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


@every
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(sample: Sample, uniform: float) -> None:
    logits = torch.full((1, 3000), float("-inf"))
    logits[0, [700, 2500]] = torch.tensor([0.0, 1.0])
    expected = 700 if uniform == 0 else 2500
    assert sample(logits, [TokenChoice(1.0, 0, 1.0, 0.0, uniform)]) == [expected]


@every
def test_entries_equal_to_the_last_one_kept_are_kept(sample: Sample) -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).expand(12, 4)
    found = sample(logits, [TokenChoice(1.0, 2, 1.0, 0.0, (i + 0.5) / 12) for i in range(12)])
    assert set(found) == {0, 1, 2}


def check_alike(sample: Sample, logits: Tensor, choice: TokenChoice) -> bool:
    """Whether a kernel draws the reference's token, and if not that it is one next to it.

    A number at the border of two tokens may fall either way by rounding, and one next to 1
    anywhere in a tail that weighs nothing.
    """
    (found,), (expected,) = sample(logits, [choice]), plain(logits, [choice])
    if found == expected:
        return True
    uniform, vocab = choice.uniform, logits.shape[1]
    (low,) = plain(logits, [choice._replace(uniform=max(0.0, uniform - 1e-6))])
    if uniform + 1e-6 < 1:
        (high,) = plain(logits, [choice._replace(uniform=uniform + 1e-6)])
    else:
        high = vocab - 1
    assert low <= found <= high
    return False


CHOICES = {
    "seed": st.integers(0, 999),
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    "top_k": st.sampled_from([0, 1, 40, 4999]),
    "top_p": st.sampled_from([1.0, 0.9, 0.2]),
    "min_p": st.sampled_from([0.0, 0.05]),
    "uniform": st.floats(0, 1, exclude_max=True),
}


@given(vocab=st.sampled_from([5, 1000, 5000]), **CHOICES)
@example(vocab=1000, seed=0, temperature=0.3, top_k=0, top_p=1.0, min_p=0.0, uniform=1 - 2.0**-53)
@settings(max_examples=20, deadline=None)
def test_the_gpu_kernel_draws_what_the_reference_draws(
    vocab: int, seed: int, **choice: Any
) -> None:
    torch.manual_seed(seed)
    logits = 4 * torch.randn(1, vocab).bfloat16().float()  # with ties, as models have them
    check_alike(gpu, logits, TokenChoice(**choice))


@pytest.mark.parametrize(
    "spread", [1.0, *(pytest.param(spread, marks=pytest.mark.slow) for spread in (0.0, 30.0))]
)
@pytest.mark.usefixtures("several_programs")
def test_the_gpu_kernel_draws_what_the_reference_draws_of_a_large_vocabulary(spread: float) -> None:
    """Whether or not what is kept can be gathered: of few values, of flat and of steep ones."""
    torch.manual_seed(0)
    logits = spread * torch.randn(1, 5_011).bfloat16().float()
    few = torch.full_like(logits, float("-inf"))
    few[0, 2000:2030] = logits[0, 2000:2030]
    kept = [(20, 0.8), (0, 0.99)]
    for each, uniform, more in ((logits, 0.42, [(500, 1.0), (1900, 1.0)]), (few, 0.5, [])):
        for top_k, top_p in kept + more:
            check_alike(gpu, each, TokenChoice(0.7, top_k, top_p, 0.0, uniform))
    check_alike(gpu, logits, TokenChoice(1.0, 40, 0.95, 0.1, 0.42))


@pytest.mark.usefixtures("several_programs")
def test_the_token_is_found_in_whatever_part_of_the_vocabulary_it_is() -> None:
    """The largest in several parts; all that is kept in one; a few in many, nothing truncated."""
    torch.manual_seed(0)
    ties = torch.randn(5_011).clamp(max=1)
    ties[[4000, 1700, 3100, 4999]] = 2.0
    only = torch.full((5_011,), -torch.inf)
    only[4_900] = -3.0
    in_one_part = torch.randn(5_011)
    in_one_part[2000:2900] += 30
    spread = torch.full((5_011,), -torch.inf)
    spread[[100, 1400, 1500, 3300]] = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    rows = [(ties, 0, 1.0, 0.0, 0.0), (torch.zeros(5_011), 0, 1.0, 0.0, 0.0)]
    rows += [(only, top_k, top_p, 0.0, 0.9) for top_k, top_p in ((0, 1.0), (20, 0.8), (0, 0.5))]
    rows += [(in_one_part, top_k, 1.0, 0.0, 0.37) for top_k in (2, 500)]
    rows += [(spread, 0, 1.0, 0.0, u) for u in (0.0, 0.05, 0.3, 0.65, 0.9, 1.0 - 2.0**-53)]
    rows += [(spread, 0, 1.0, 0.3, 0.4), (spread, 3, 1.0, 0.0, 0.99)]
    temperatures = [0.0, 0.0, *[1.0] * (len(rows) - 2)]
    logits = torch.stack([row for row, *_ in rows])
    choices = [TokenChoice(t, *row[1:]) for t, row in zip(temperatures, rows, strict=True)]
    found = gpu(logits, choices)
    assert found == plain(logits, choices)
    assert found[:5] == [1700, 0, 4900, 4900, 4900]
    assert found[7:13] == [100, 100, 1400, 1500, 3300, 3300]


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter counts what is read")
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(20, 0.8), pytest.param(50, 1.0, marks=pytest.mark.slow), (0, 0.95)]
)
def test_the_gpu_kernel_reads_a_row_twice_to_truncate_it(
    top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds are searched for among the few entries that may be above them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    load, read = builder.create_masked_load, 0

    def counted(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal read
        read += int(mask.data.sum())
        return load(self, pointers, mask, *rest)

    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 152_064).bfloat16().float()
    choice = TokenChoice(0.7, top_k, top_p, 0.0, 0.5)
    expected = plain(logits, [choice])
    monkeypatch.setattr(builder, "create_masked_load", counted)
    assert gpu(logits, [choice]) == expected
    assert 2 * 152_064 <= read < 2.5 * 152_064


@given(
    vocab=st.sampled_from([1, 5, 63, 64, 1000, 5000, 40_001]),
    spread=st.sampled_from([0.0, 0.1, 4.0, 30.0]),
    barred=st.booleans(),
    **CHOICES,
)
@example(
    vocab=1000,
    spread=4.0,
    barred=False,
    seed=0,
    temperature=0.3,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    uniform=1 - 2.0**-53,
)
@settings(max_examples=300, deadline=None)
def test_the_cpu_kernel_draws_what_the_reference_draws(
    vocab: int, spread: float, barred: bool, seed: int, **choice: Any
) -> None:
    """Of flat and of steep distributions, with ties, and with tokens that may not come."""
    torch.manual_seed(seed)
    logits = spread * torch.randn(1, vocab).bfloat16().float()
    if barred and vocab > 1:
        logits[0, torch.randperm(vocab)[: vocab * 3 // 4]] = float("-inf")
    check_alike(cpu, logits, TokenChoice(**choice))


def test_the_cpu_kernel_draws_the_same_tokens_as_the_reference_in_a_long_text(
    cpu: CpuLibrary,
) -> None:
    """Not next to it: borders lie a ten-millionth apart."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(200, 3000)).bfloat16().float()
    for top_k, top_p, min_p in ((20, 0.8, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.05), (0, 1.0, 0.0)):
        numbers = torch.rand(200).tolist()
        choices = [TokenChoice(0.7, top_k, top_p, min_p, number) for number in numbers]
        assert cpu.sample_tokens(logits, choices).tolist() == plain(logits, choices)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_whatever_the_logits_the_token_is_one_of_the_vocabulary(
    value: float, top_k: int, top_p: float
) -> None:
    for rows in (torch.full((2, 100), value), torch.randn(2, 100)):
        rows[0, 7] = value
        choice = TokenChoice(1.0, top_k, top_p, 0.0, 0.5)
        assert all(0 <= token < 100 for token in cpu(rows, [choice] * 2))


@pytest.mark.usefixtures("several_programs")
def test_a_row_is_drawn_alike_in_any_company() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 3000)
    choices = [TokenChoice(t, 50 * (t > 1), 0.9, 0.0, 0.37) for t in (0.0, 0.7, 1.5, 1.0, 2.0)]
    choices.append(TokenChoice(1.0, 0, 1.0, 0.0, 0.37))
    for sample in (plain, gpu, cpu):
        together = sample(logits, choices)
        alone = [sample(logits[i : i + 1], [choice])[0] for i, choice in enumerate(choices)]
        assert alone == together
