"""Figures that compare models are those a reader would compute by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nybble.loaders import open_checkpoint, save_packed
from nybble.quantizers import quantize_checkpoint
from nybble.quantizers.corpus import Part, standard_library_text, token_ids, token_windows
from nybble.quantizers.evaluate import Evaluation, Measured, Window, evaluate, plot, table, windows
from nybble.quantizers.packed_model import PackedLinear, load_packed_model


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(5))


def test_windows_without_overlap_do_not_predict_their_first_token() -> None:
    assert windows(10, 4, 4) == [Window(0, 1, 4), Window(4, 5, 8), Window(8, 9, 10)]
    assert windows(9, 4, 4) == [Window(0, 1, 4), Window(4, 5, 8)]  # the ninth stands alone


def test_sliding_windows_score_every_token_once() -> None:
    found = windows(23, 8, 3)
    scored = [token for window in found for token in range(window.scored, window.stop)]
    assert scored == list(range(1, 23))
    assert all(window.stop - window.start <= 8 for window in found)
    # After the first window every scored token has at least length − stride tokens before it.
    assert all(window.scored - window.start >= 5 for window in found[1:])


@pytest.mark.parametrize(("count", "length", "stride"), [(1, 4, 4), (10, 4, 5), (10, 4, 0)])
def test_windows_that_make_no_sense_are_refused(count: int, length: int, stride: int) -> None:
    with pytest.raises(ValueError, match=r"predicts nothing|must be between 1"):
        windows(count, length, stride)


def write_model(folder: Path, family: str) -> Path:
    config = AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        logits_scaling=8.0,
        logit_scale=0.25,
        final_logit_softcapping=3.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen2", "granite", "cohere2", "gemma2"])
def test_figures_equal_those_from_transformers_own_model(tmp_path: Path, family: str) -> None:
    """Granite and Cohere scale logits, Gemma 2 caps them."""
    source, ids = write_model(tmp_path / "m", family), tokens(300)
    quantize_checkpoint(source, tmp_path / "q", format="nf4", double_quant=True, progress=False)
    exact, found = evaluate(
        source, {"nf4": tmp_path / "q"}, ids, length=64, dtype=torch.float32, progress=False
    )

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    @torch.no_grad()
    def log_probabilities() -> torch.Tensor:
        logits = [model(part[None]).logits[0, :-1] for part in ids.split(64)]
        return torch.cat(logits).log_softmax(-1)

    labels = torch.cat([part[1:] for part in ids.split(64)])
    ours = log_probabilities()
    packed = load_packed_model(
        open_checkpoint(tmp_path / "q"), device=torch.device("cpu"), dtype=torch.float32
    )
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            model.get_submodule(name).weight.data = module.packed.dequantize()
    theirs = log_probabilities()
    for evaluation, values in ((exact, ours), (found, theirs)):
        loss = -values.gather(1, labels[:, None]).mean()
        assert evaluation.perplexity == pytest.approx(float(loss.exp()), rel=1e-3)
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert found.kl_divergence.value == pytest.approx(float(divergence), rel=0.02)
    assert exact.kl_divergence.value == 0
    assert exact.scored_tokens == len(labels)


def test_a_reference_in_higher_precision_shows_what_the_lower_one_costs(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    source, ids = tiny_model(), tokens(300)
    quantize_checkpoint(source, tmp_path / "q", format="nf4", progress=False)
    exact, lower, found = evaluate(
        source,
        {"nf4": tmp_path / "q"},
        ids,
        length=64,
        reference_dtype=torch.float32,
        progress=False,
    )
    assert [exact.name, lower.name, found.name] == ["float32", "bfloat16", "nf4"]

    def log_probabilities(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        with torch.no_grad():
            logits = [model(part[None]).logits[0, :-1] for part in ids.split(64)]
        return torch.cat(logits).float().log_softmax(-1)

    best, rounded = map(log_probabilities, (torch.float32, torch.bfloat16))
    divergence = (best.exp() * (best - rounded)).sum(-1).mean()
    assert exact.kl_divergence.value == 0
    assert lower.kl_divergence.value == pytest.approx(float(divergence), rel=0.1)
    assert found.kl_divergence.value > 10 * lower.kl_divergence.value


def test_sizes_are_those_on_disk(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    source = tiny_model()
    quantize_checkpoint(source, tmp_path / "q", format="awq", group_size=64, progress=False)
    save_packed(open_checkpoint(tmp_path / "q"), tmp_path / "p", layout="rows", progress=False)
    exact, found, packed = evaluate(
        source,
        {"awq": tmp_path / "q", "packed": tmp_path / "p"},
        tokens(40),
        length=32,
        progress=False,
    )
    assert exact.bits_per_weight == 16
    assert found.bits_per_weight == 4 + (16 + 4) / 64
    assert packed.bits_per_weight == 4 + (16 + 16) / 64  # zeros as real numbers
    assert packed.perplexity == found.perplexity
    assert 0 < (tmp_path / "q" / "model.safetensors").stat().st_size - found.size < 20_000


def test_models_with_another_vocabulary_are_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="has a vocabulary of 300, the full-precision model one"):
        evaluate(
            tiny_model(),
            {"other": tiny_model(vocab_size=300)},
            tokens(40) % 256,
            length=32,
            progress=False,
        )


def evaluation(name: str, losses: torch.Tensor, divergences: torch.Tensor) -> Evaluation:
    counts = torch.full((len(losses),), 10.0, dtype=torch.float64)
    return Evaluation(name, counts, losses, divergences, 300_000, 4.3125, 150.0)


def test_errors_are_the_spread_over_many_such_texts() -> None:
    """Windows share a difficulty; the models differ by little. 400 texts of 64 windows each."""
    torch.manual_seed(0)
    ratios, divergences, claimed = [], [], []
    for _ in range(400):
        difficulty = 20 + 8 * torch.randn(64, dtype=torch.float64)
        change = 0.3 + 0.2 * torch.randn(64, dtype=torch.float64)
        exact = evaluation("exact", difficulty, torch.zeros(64, dtype=torch.float64))
        rounded = evaluation("rounded", difficulty + change, change.square())
        ratio, divergence = rounded.perplexity_ratio(exact), rounded.kl_divergence
        ratios.append(ratio.value)
        divergences.append(divergence.value)
        claimed.append([ratio.error, divergence.error])
    spread = torch.tensor([ratios, divergences]).std(1)
    torch.testing.assert_close(torch.tensor(claimed).mean(0), spread, rtol=0.1, atol=0)
    assert spread[0] < 0.01  # of perplexity alone it would be 0.75
    assert sum(ratios) / 400 == pytest.approx(2.718281828**0.03, rel=1e-3)


def test_windows_of_different_lengths_count_by_their_tokens() -> None:
    counts = torch.tensor([10.0, 30.0], dtype=torch.float64)
    found = Evaluation("a", counts, counts * 0.5, counts * 0.25, 1, 4.0, 1.0)
    assert found.kl_divergence == Measured(0.25, 0.0)
    assert found.scored_tokens == 40


def test_a_single_window_has_no_error_to_state() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert math.isnan(evaluation("a", one, one).kl_divergence.error)


def test_the_table_and_the_plot_hold_every_model(tmp_path: Path) -> None:
    base = torch.tensor([20.0, 22.0], dtype=torch.float64)
    found = [
        evaluation("full precision", base, torch.zeros(2, dtype=torch.float64)),
        evaluation("rtn", base + 0.5, torch.tensor([0.5, 0.7], dtype=torch.float64)),
        evaluation("awq", base + 0.4, torch.tensor([0.4, 0.6], dtype=torch.float64)),
    ]

    def cells(row: str) -> list[str]:
        return [cell.strip() for cell in row.split("|")[1:-1]]

    lines = table(found).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert cells(lines[4]) == [
        *("awq", "8.499", "1.0408 ± 0.0000", "0.0500 ± 0.0100", "0", "4.312", "150")
    ]
    lines = table(found, baseline=found[1]).splitlines()
    assert cells(lines[0])[2:5] == ["÷ rtn", "KL divergence", "− rtn"]
    assert cells(lines[3])[2:5] == ["", "0.0600 ± 0.0100", ""]
    assert cells(lines[4])[2:5] == ["0.9900 ± 0.0000", "0.0500 ± 0.0100", "-0.0100 ± 0.0000"]
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_texts_to_calibrate_choose_and_report_on_share_no_long_line() -> None:
    parts: tuple[Part, ...] = ("calibration", "validation", "held-out")
    texts = [standard_library_text(part) for part in parts]
    assert min(map(len, texts)) > 1_000_000
    lines = [[line.strip() for line in text.splitlines()] for text in texts]
    every = [line for part in lines for line in part if len(line) > 30]
    assert len(every) > 50_000
    assert len(set(every)) == len(every)
    assert standard_library_text("held-out") == texts[2]


def test_windows_of_tokens_are_taken_from_the_text(tiny_model: Callable[..., Path]) -> None:
    text = standard_library_text("calibration")[:20_000]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    found = token_windows(tokenizer, text, samples=5, length=64)
    assert found.shape == (5, 64)
    every = token_ids(tokenizer, text).unfold(0, 64, 64)
    assert all((row == every).all(-1).any() for row in found)
    with pytest.raises(ValueError, match="5000 samples of 64 were asked for"):
        token_windows(tokenizer, text, samples=5000, length=64)
