"""A mixture of experts on a GPU: answers as on the CPU, one wait a step, nothing compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import Engine, EngineConfig
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.quantizers import InFlight

from .device import DEVICE, Device
from .test_serving import CPU, GPU, ONE_WAIT, ask, request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "mixtral"
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder / name)
    return folder


@contextmanager
def running(checkpoint: Checkpoint, config: EngineConfig) -> Iterator[Engine]:
    engine = Engine.load(checkpoint, replace(config, adapters=None), progress=False)
    DEVICE.computes = False
    engine.warm_up(progress=False)
    DEVICE.computes = True
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def test_answers_are_as_on_the_cpu_with_one_wait_a_step_and_no_compiling(
    gpu: Device, folder: Path
) -> None:
    requests = [request("one", 5, 3), request("long", 40, 37), request("late", 120, 2)]
    in_4_bits = InFlight(open_checkpoint(folder), layers="nf4")
    with running(in_4_bits, CPU) as engine:
        expected = ask(engine, requests)
    with running(in_4_bits, GPU) as engine:
        warm = set(gpu.launched)
        gpu.waits.clear()
        assert ask(engine, requests) == expected
        steps = engine.stats().steps
    assert gpu.replays > 0
    assert any("grouped" in str(launch) for launch in warm)
    assert set(gpu.launched) - warm == set()
    waits = [each for each in gpu.waits if "inputs.build" not in each]
    assert set(waits) == {ONE_WAIT}
    assert len(waits) <= steps


def test_experts_in_16_bits_are_refused_by_name(gpu: Device, folder: Path) -> None:
    with pytest.raises(ValueError, match="a GPU computes experts in 4 bits"):
        Engine.load(open_checkpoint(folder), replace(GPU, adapters=None), progress=False)


def test_mixtures_in_one_order_are_refused_by_name(gpu: Device, folder: Path) -> None:
    in_4_bits = InFlight(open_checkpoint(folder), layers="nf4")
    config = replace(GPU, adapters=None, deterministic=True)
    with pytest.raises(ValueError, match="deterministic: a GPU computes mixtures of experts"):
        Engine.load(in_4_bits, config, progress=False)


def test_hybrid_models_in_one_order_are_refused_by_name(
    gpu: Device, tiny_model: Callable[..., Path]
) -> None:
    one_order = replace(GPU, adapters=None, deterministic=True)
    with pytest.raises(ValueError, match="deterministic: a GPU reads prompts of lfm2 models"):
        Engine.load(open_checkpoint(tiny_model(family="lfm2")), one_order, progress=False)
