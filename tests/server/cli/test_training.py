"""A full-precision model becomes a calibrated checkpoint, is measured and fine-tuned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from nybble.loaders import open_checkpoint
from nybble.server.cli.main import app

TEXT = "the quick brown fox jumps over the lazy dog; " * 80


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers as small as these lose more to waiting for another thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def nybble(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_calibrated_quantization_then_evaluation(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    shared = ("--group-size", 32, "--text", text, "--samples", 4, "--length", 64)
    for format, *options in (("gptq", "--desc-act"), ("awq",)):
        out = tmp_path / format
        nybble("quantize", "--format", format, *options, *shared, tiny_model(), out)
        assert open_checkpoint(out).format == format
    gptq = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert gptq["desc_act"] is True
    plot = tmp_path / "plot.png"
    measured = ("--text", text, "--tokens", 128, "--length", 64)
    models = [tmp_path / "gptq", tmp_path / "awq"]
    table = nybble("eval", tiny_model(), *models, *measured, "--plot", plot).stdout.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["full precision", "gptq", "awq"]
    assert plot.is_file()
    sliding = ("--stride", 16, "--baseline", models[0])
    table = nybble("eval", tiny_model(), *models, *measured, *sliding).stdout.splitlines()
    assert "÷ gptq" in table[0]
    refused = CliRunner().invoke(app, ["eval", *map(str, models), "--baseline", "c"])
    assert "--baseline c is not one of the models to compare" in refused.output


@pytest.mark.slow
def test_the_cost_of_8_bits_is_far_below_what_the_adapter_changes(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for adapter in (tiny_adapter(), tiny_token_adapter(), tiny_adapter(ia3=True)):
        said = nybble("eval-adapter", tiny_model(), adapter, "--text", text).stdout
        pattern = rf" tokens of {text}: (\S+) nats a token; without the adapter it is (\S+)\n"
        found = re.search(pattern, said)
        assert found is not None, said
        cost, effect = map(float, found.groups())
        # The factors of (IA)³ are not rounded.
        assert 0 <= cost < 0.1 * effect


@pytest.mark.parametrize(
    ("image", "message"),
    [("loss.txt", "has to end in .png"), ("none/loss.png", "there is no folder")],
)
def test_an_image_that_cannot_be_drawn_is_refused_before_the_work(
    tiny_model: Callable[..., Path], tmp_path: Path, image: str, message: str
) -> None:
    plot = ["--plot", str(tmp_path / image)]
    model, data, out = str(tiny_model()), tmp_path / "data.jsonl", str(tmp_path / "out")
    data.write_text(json.dumps({"text": TEXT}))
    for command in (["finetune", model, str(data), out], ["eval", model, model]):
        refused = CliRunner().invoke(app, [*command, *plot])
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())


def test_fine_tuning_writes_an_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": TEXT[i : i + 80]}) for i in range(8)))
    options = ("--max-steps", 2, "--rank", 2, "--target-modules", "q_proj,v_proj")
    options += ("--learning-rate", 1e-30)  # at which nothing is learned
    plot = tmp_path / "loss.png"
    shared = (*options, "--plot", plot)
    done = nybble("finetune", tiny_model(), data, tmp_path / "adapter", *shared)
    assert "Training: 2/2 steps" in done.stderr
    assert "held-out loss" in done.stderr
    assert "at step 0 of 2, " in done.stderr
    assert "warning: no evaluation was better than the start" in done.stderr
    assert "MiB, of which the base's weights" in done.stderr
    assert plot.is_file()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["q_proj", "v_proj"])
    nybble("qat", tiny_model(), data, tmp_path / "qat", "--steps", 2, "--group-size", 32)
    assert open_checkpoint(tmp_path / "qat").format == "gptq"
