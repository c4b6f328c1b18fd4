"""A mixture of experts on a GPU: answers as on the CPU, one wait a step, nothing compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import AdapterConfig, Engine, EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.parts import MixturePart
from nybble.loaders import AdapterError, Checkpoint, open_checkpoint
from nybble.models import architecture_of
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
def running(
    checkpoint: Checkpoint, config: EngineConfig, adapters: AdapterConfig | None = None
) -> Iterator[Engine]:
    engine = Engine.load(checkpoint, replace(config, adapters=adapters), progress=False)
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


@pytest.mark.parametrize("layers", [None, "nf4"])
def test_a_layers_experts_are_never_on_the_device_twice(
    gpu: Device, folder: Path, tmp_path: Path, layers: Any
) -> None:
    """They are put one after another as they come, since the kernel reads them as one tensor."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, num_local_experts=32)
    )
    model.save_pretrained(tmp_path)
    checkpoint = InFlight(open_checkpoint(tmp_path), layers=layers)
    before = gpu.peak = gpu.allocated
    decoder = Decoder(
        architecture_of(checkpoint.config),
        checkpoint.weights(),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        max_model_len=64,
    )
    parts = [b.part for blocks in decoder._blocks for b in blocks]
    down = [p.down for p in parts if isinstance(p, MixturePart)]
    experts = [kernel.keywords["experts"].matrices.nbytes for kernel in down]  # type: ignore[attr-defined]
    assert len(experts) == 2
    assert gpu.peak < gpu.allocated + experts[0] // 2
    assert gpu.allocated - before > 2 * 3 * experts[0]


def adapter_on_experts(base: Path, to: Path, *, seed: int, **options: Any) -> Path:
    """A random one by peft; of all stacked experts, unless options say otherwise."""
    torch.manual_seed(seed)
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": stacked}
    settings |= options
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """On all experts' layers, on down projections alone, and on attention alone.

    Made before there seems to be a GPU: peft and transformers would remember it.
    """
    to, down = tmp_path_factory.mktemp("adapters"), ["mlp.experts.down_proj"]
    return {
        "all": adapter_on_experts(folder, to / "all", seed=1),
        "down": adapter_on_experts(folder, to / "down", seed=2, target_parameters=down),
        "attention": adapter_on_experts(folder, to / "q", seed=3, target_parameters=None),
    }


@pytest.mark.slow
def test_experts_in_16_bits_and_adapters_on_them_answer_as_on_the_cpu(
    gpu: Device, folder: Path, adapters: dict[str, Path]
) -> None:
    """In one batch with the base and an adapter on attention; one wait a step, no compiling."""
    requests = [request("base", 5, 3)] + [
        request(name, 20 + 3 * index, length, adapter=name)
        for index, (name, length) in enumerate(zip(adapters, (37, 4, 6), strict=True))
    ]
    of_three = AdapterConfig(slots=3, max_rank=4, device_bytes=1 << 18)
    answers = []
    for config in (CPU, GPU):
        with running(open_checkpoint(folder), config, of_three) as engine:
            warm = set(gpu.launched)
            for name, each in adapters.items():
                engine.load_adapter(name, str(each))
            gpu.waits.clear()
            answers.append(ask(engine, requests))
            steps, waited = engine.stats().steps, list(gpu.waits)
            plain = ask(engine, [replace(each, adapter=None) for each in requests])
    assert answers[0] == answers[1]
    assert all(a != b for a, b in zip(answers[1][1:], plain[1:], strict=True))
    assert gpu.replays > 0
    assert set(gpu.launched) - warm == set()
    waits = [each for each in waited if "inputs.build" not in each]
    assert set(waits) == {ONE_WAIT}
    assert len(waits) <= steps


def test_an_adapter_larger_than_the_memory_for_adapters_is_refused_by_name(
    gpu: Device, folder: Path, adapters: dict[str, Path]
) -> None:
    """By default the memory holds adapters on all layers but experts."""
    config = replace(GPU, adapters=AdapterConfig(slots=1, max_rank=4))
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    with pytest.raises(AdapterError, match="raise device_bytes"):
        engine.load_adapter("all", str(adapters["all"]))


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
