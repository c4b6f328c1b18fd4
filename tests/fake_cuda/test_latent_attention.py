"""DeepSeek on a GPU: answers as on the CPU, one wait a step, nothing compiled on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import Engine
from nybble.loaders import AdapterError, open_checkpoint
from nybble.quantizers import InFlight

from .device import Device
from .test_serving import CPU, GPU, ONE_WAIT, ask, request, running


def saved(folder: Path, tokenizer: Path, **settings: Any) -> Path:
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        **settings,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """One layer, without experts."""
    folder = tmp_path_factory.mktemp("latent") / "deepseek"
    return saved(folder, tiny_model(), num_hidden_layers=1, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def adapters(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One on what is cached and on the output, one on what is absorbed."""
    folders = {}
    for name, modules in (
        ("around", ["kv_a_proj_with_mqa", "q_b_proj", "o_proj"]),
        ("absorbed", ["kv_b_proj"]),
    ):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(dense)
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=modules))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        adapted.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(
    "kv_dtype", ["auto", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "int8"))]
)
def test_answers_are_as_on_the_cpu_with_one_wait_a_step_and_no_compiling(
    gpu: Device, dense: Path, adapters: dict[str, Path], kv_dtype: Any
) -> None:
    """Prompts in chunks beside decodes, with an adapter and without."""
    requests = [
        request("one", 5, 3),
        request("long", 40, 37, adapter="around"),
        request("late", 120, 2, max_tokens=2),
    ]
    with running(dense, CPU) as engine:
        engine.load_adapter("around", str(adapters["around"]))
        expected = ask(engine, requests)
    with running(dense, replace(GPU, kv_dtype=kv_dtype)) as engine:
        warm = set(gpu.launched)
        engine.load_adapter("around", str(adapters["around"]))
        gpu.waits.clear()
        answers = ask(engine, requests)
        steps = engine.stats().steps
    if kv_dtype == "auto":
        assert answers == expected
    assert list(map(len, answers)) == list(map(len, expected))
    assert gpu.replays > 0
    for kernel in ("latent_store", "latent_decode", "latent_prefill"):
        assert any(kernel in str(launch) for launch in warm), kernel
    assert set(gpu.launched) - warm == set()
    waits = [each for each in gpu.waits if "inputs.build" not in each]
    assert set(waits) == {ONE_WAIT}
    assert len(waits) <= steps


@pytest.mark.slow
def test_a_mixture_in_4_bits_answers_as_on_the_cpu(
    gpu: Device, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = saved(tmp_path / "mixture", tiny_model(), num_hidden_layers=2, first_k_dense_replace=1)
    requests = [request("one", 5, 3), request("long", 40, 37), request("late", 120, 2)]
    answers = []
    for config in (CPU, GPU):
        checkpoint = InFlight(open_checkpoint(folder), layers="nf4")
        engine = Engine.load(checkpoint, replace(config, adapters=None), progress=False)
        engine.start()
        try:
            answers.append(ask(engine, requests))
        finally:
            engine.stop()
    assert answers[0] == answers[1]


def test_adapters_on_what_is_absorbed_are_refused_by_name(
    gpu: Device, dense: Path, adapters: dict[str, Path]
) -> None:
    engine = Engine.load(open_checkpoint(dense), GPU, progress=False)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.kv_b_proj, which latent"):
        engine.load_adapter("absorbed", str(adapters["absorbed"]))


def test_latents_in_one_order_are_refused_by_name(gpu: Device, dense: Path) -> None:
    one_order = replace(GPU, adapters=None, deterministic=True)
    with pytest.raises(ValueError, match="deterministic: a GPU reads the latents of deepseek"):
        Engine.load(open_checkpoint(dense), one_order, progress=False)
