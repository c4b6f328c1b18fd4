"""State spaces on a GPU: answers as on the CPU, one wait a step, nothing compiled on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .device import Device
from .test_serving import CPU, GPU, ONE_WAIT, ask, request, running


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    config = AutoConfig.for_model(
        "granitemoehybrid",
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=0,
        shared_intermediate_size=64,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_n_groups=2,
        mamba_d_state=16,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path / "granite"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder / name)
    return folder


def test_answers_are_as_on_the_cpu_with_one_wait_a_step_and_no_compiling(
    gpu: Device, folder: Path
) -> None:
    """Prompts in chunks of a scan beside decodes, which go row by row."""
    requests = [request("one", 5, 3), request("long", 40, 37), request("late", 120, 2)]
    with running(folder, replace(CPU, adapters=None)) as engine:
        expected = ask(engine, requests)
    with running(folder, replace(GPU, adapters=None)) as engine:
        warm = set(gpu.launched)
        gpu.waits.clear()
        assert ask(engine, requests) == expected
        steps = engine.stats().steps
    assert gpu.replays > 0
    for kernel in ("convolution", "scan_by_rows", "scan_by_chunks", "gated_norm"):
        assert any(kernel in str(launch) for launch in warm), kernel
    assert set(gpu.launched) - warm == set()
    waits = [each for each in gpu.waits if "inputs.build" not in each]
    assert set(waits) == {ONE_WAIT}
    assert len(waits) <= steps
