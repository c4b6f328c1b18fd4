"""Adapters with DoRA, with biases of their own or trained ones, AdaLoRA, VeRA, (IA)³: as peft."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nybble.engine import AdapterConfig, Request, SamplingParams
from nybble.engine.adapter_slots import AdapterSlots
from nybble.loaders import AdapterError, load_adapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.loaders.adapter_vectors import vector_changes
from nybble.models import architecture_of
from nybble.quantizers import merge_adapter, quantize_checkpoint

WEIGHTS = "adapter_model.safetensors"
# Each kind once plain, and once beside settings that change scales and which layers have adapters.
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora on some": {
        "use_dora": True,
        "target_modules": ["k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2},
        "use_rslora": True,
    },
    "dora and biases": {"use_dora": True, "bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "lora_bias": {"lora_bias": True, "lora_alpha": 6},
    "lora_only": {"bias": "lora_only", "target_modules": ["v_proj", "down_proj"]},
    "all": {"bias": "all", "target_modules": ["k_proj", "o_proj"]},
    "plain": {},
}


@pytest.fixture(scope="session")
def wild_adapter(
    tiny_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of an adapter of a kind, whose magnitudes and biases are far from the base's."""
    built: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in built:
            folder = tmp_path_factory.mktemp("kinds") / "adapter"
            shutil.copytree(tiny_adapter(seed=len(built), **KINDS[kind]), folder)
            tensors = load_file(folder / WEIGHTS)
            generator = torch.Generator().manual_seed(len(built))
            for name, tensor in tensors.items():
                if "magnitude" in name:
                    tensor *= 0.5 + torch.rand(tensor.shape, generator=generator)
                elif name.endswith("bias"):
                    tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
            built[kind] = folder
        return built[kind]

    return build


@pytest.mark.parametrize(
    "format",
    ["bf16", "gptq", *(pytest.param(each, marks=pytest.mark.slow) for each in ("awq", "nf4"))],
)
def test_each_kind_says_what_peft_says_alone_and_in_company(
    reference: Any,
    tiny_model: Callable[..., Path],
    wild_adapter: Callable[[str], Path],
    tmp_path: Path,
    format: str,
) -> None:
    """In two slots, so that each adapter is swapped in where another kind was."""
    base = tiny_model()
    if format != "bf16":
        quantize_checkpoint(base, tmp_path / "q", format=format, group_size=32, progress=False)  # type: ignore[arg-type]
        base = tmp_path / "q"
    checkpoint = open_checkpoint(base)
    (plain,) = reference.greedy(reference.transformers_model(checkpoint), (11,), 12)
    expected = {}
    for kind in KINDS:
        model = PeftModel.from_pretrained(
            reference.transformers_model(checkpoint), wild_adapter(kind)
        )
        (expected[kind],) = reference.greedy(model.eval(), (11,), 12)
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=2, max_rank=4))
    try:
        for kind, each in expected.items():
            engine.load_adapter(kind, str(wild_adapter(kind)))
            assert reference.alone(engine, each.prompt, 12, adapter=kind) == each.tokens, kind

        async def together() -> list[list[int]]:
            return await asyncio.gather(
                reference.collect(engine, "base", plain.prompt, max_tokens=12),
                *(
                    reference.collect(engine, kind, each.prompt, max_tokens=12, adapter=kind)
                    for kind, each in expected.items()
                ),
            )

        assert asyncio.run(together()) == [plain.tokens, *(e.tokens for e in expected.values())]
    finally:
        engine.stop()
    assert len({tuple(each.tokens) for each in expected.values()}) == len(KINDS)


def test_in_16_bits_each_kind_says_in_company_what_it_says_alone_to_the_last_bit(
    reference: Any,
    tiny_model: Callable[..., Path],
    wild_adapter: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """With the compiled kernels, which compute bfloat16."""
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    engine = reference.start(
        open_checkpoint(tmp_path / "q"),
        dtype=torch.bfloat16,
        adapters=AdapterConfig(slots=8, max_rank=4),
    )
    prompts = {kind: tuple(range(5 + i, 25 + i)) for i, kind in enumerate([None, *KINDS])}

    async def said(kind: str | None) -> list[tuple[int, float]]:
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
        request = Request(f"{kind}", prompts[kind], params, adapter=kind)
        found = [output async for output in engine.generate(request)]
        return [(output.token_ids[0], output.logprobs[0].logprob) for output in found]

    async def together() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*map(said, prompts))

    try:
        for kind in KINDS:
            engine.load_adapter(kind, str(wild_adapter(kind)))
        alone = [asyncio.run(said(kind)) for kind in prompts]
        assert asyncio.run(together()) == alone
    finally:
        engine.stop()


def test_adalora_with_the_ranks_that_training_kept_says_what_peft_says(
    reference: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    steps = 6
    config = AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"],
        init_r=6,
        target_r=2,
        lora_alpha=40,
        tinit=1,
        tfinal=1,
        total_step=steps,
        task_type="CAUSAL_LM",
    )
    checkpoint = open_checkpoint(tiny_model())
    torch.manual_seed(0)
    trained = get_peft_model(reference.transformers_model(checkpoint), config)
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.05)
    text = torch.randint(3, 250, (2, 24))
    for step in range(steps):
        trained(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        trained.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    trained.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, checkpoint.architecture)
    ranks = {module.rank for module in adapter.modules.values()}
    assert len(ranks) > 1, "training took no ranks away"
    model = PeftModel.from_pretrained(reference.transformers_model(checkpoint), tmp_path)
    (expected,) = reference.greedy(model.eval(), (11,), 12)
    for name, module in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        change = module.merged(layer.base_layer.weight) - layer.base_layer.weight
        torch.testing.assert_close(change, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-4)
        assert module.rank == 0 or change.abs().max() > 1e-3
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=1, max_rank=6))
    try:
        engine.load_adapter("a", str(tmp_path))
        assert reference.alone(engine, expected.prompt, 12, adapter="a") == expected.tokens
        assert reference.alone(engine, expected.prompt, 12) != expected.tokens
    finally:
        engine.stop()
    merge_adapter(tiny_model(), adapter, tmp_path / "merged", progress=False)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), merged[name], rtol=2**-8, atol=1e-5)


def test_vera_whose_matrices_all_modules_share_says_what_peft_says(
    reference: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = VeraConfig(r=12, target_modules=modules, task_type="CAUSAL_LM")
    checkpoint = open_checkpoint(tiny_model())
    torch.manual_seed(0)
    trained = get_peft_model(reference.transformers_model(checkpoint), config)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (1 if "lambda_b" in name else 0.1)
    trained.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, checkpoint.architecture)
    model = PeftModel.from_pretrained(reference.transformers_model(checkpoint), tmp_path)
    (expected,) = reference.greedy(model.eval(), (11,), 12)
    assert {name.rpartition(".")[2] for name in adapter.modules} == set(modules)
    for name, module in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        change = module.merged(layer.base_layer.weight) - layer.base_layer.weight
        torch.testing.assert_close(change, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-4)
        assert change.abs().max() > 1e-3
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=1, max_rank=12))
    try:
        engine.load_adapter("a", str(tmp_path))
        assert reference.alone(engine, expected.prompt, 12, adapter="a") == expected.tokens
        assert reference.alone(engine, expected.prompt, 12) != expected.tokens
    finally:
        engine.stop()
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"][:, :100].contiguous()
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match="are for 100 inputs and 256 outputs, but a module of"):
        load_adapter(tmp_path, checkpoint.architecture)


def wild_ia3(model: PreTrainedModel, modules: list[str]) -> PeftModel:
    config = IA3Config(
        target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    trained = get_peft_model(model, config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.7 * torch.randn_like(parameter)
    return trained


def change(model: PreTrainedModel, modules: Mapping[str, LoRAModule]) -> None:
    with torch.no_grad():
        for name, module in modules.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(module.merged(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(module.bias(layer.bias))


def test_ia3_which_multiplies_outputs_and_inputs_of_the_mlp_s_last_layer_says_what_peft_says(
    reference: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Of k and v, whose biases are multiplied too; and of ``up`` twice."""
    modules = ["k_proj", "v_proj", "up_proj", "down_proj"]
    checkpoint = open_checkpoint(tiny_model())
    wild_ia3(reference.transformers_model(checkpoint), modules).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(reference.transformers_model(checkpoint), tmp_path)
    (expected,) = reference.greedy(model.eval(), (11,), 12)
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=1, max_rank=1))
    try:
        engine.load_adapter("a", str(tmp_path))
        assert reference.alone(engine, expected.prompt, 12, adapter="a") == expected.tokens
        assert reference.alone(engine, expected.prompt, 12) != expected.tokens
    finally:
        engine.stop()
    adapter = load_adapter(tmp_path, checkpoint.architecture)
    merge_adapter(tiny_model(), adapter, tmp_path / "merged", progress=False)
    merged = reference.transformers_model(checkpoint)
    change(merged, adapter.modules)
    ids = torch.tensor([expected.prompt])
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    exact = merged.state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    first = modules[0]
    settings["feedforward_modules"] = ["down_proj", f"layers.0.self_attn.{first}"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / WEIGHTS)
    key = f"base_model.model.model.layers.0.self_attn.{first}.ia3_l"
    tensors[key] = torch.ones(1, checkpoint.architecture.linears[key[17:-6]].inputs)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match=f"layers.0.self_attn.{first}, whose inputs cannot be"):
        load_adapter(tmp_path, checkpoint.architecture)


def test_ia3_on_an_mlp_whose_gate_and_up_are_one_layer_computes_what_peft_does() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    plain = copy.deepcopy(model)
    trained = wild_ia3(model, ["o_proj", "gate_up_proj", "down_proj"])
    vectors = {
        name.removesuffix(".ia3_l.default").removeprefix("base_model.model."): parameter.detach()
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad
    }
    feedforward = [name for name in vectors if name.endswith("down_proj")]
    change(plain, vector_changes(Path("a"), vectors, feedforward, architecture_of(config)))
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(plain(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "message"), [("dora", "the adapter has DoRA"), ("lora_bias", "the adapter has biases")]
)
def test_kinds_without_a_kernel_on_a_gpu_are_refused_before_anything_is_copied(
    tiny_model: Callable[..., Path], wild_adapter: Callable[[str], Path], kind: str, message: str
) -> None:
    architecture = open_checkpoint(tiny_model()).architecture
    slots = AdapterSlots(
        architecture, count=1, max_rank=4, device=torch.device("cpu"), dtype=torch.float32
    )
    slots.device = torch.device("cuda")
    adapter = load_adapter(wild_adapter(kind), architecture)
    with pytest.raises(AdapterError, match=f"{message}, which a GPU does not compute so far"):
        slots.stage(adapter)


def test_magnitudes_take_no_more_than_two_numbers_for_each_output(
    reference: Any, tiny_model: Callable[..., Path], wild_adapter: Callable[[str], Path]
) -> None:
    engine = reference.start(
        open_checkpoint(tiny_model()), adapters=AdapterConfig(slots=1, max_rank=4)
    )
    try:
        plain = engine.load_adapter("plain", str(wild_adapter("plain")))
        dora = engine.load_adapter("dora", str(wild_adapter("dora")))
    finally:
        engine.stop()
    # Two layers; q, k, v, o, gate, up, down; float32.
    assert dora.nbytes - plain.nbytes == 2 * 2 * 4 * (128 + 64 + 64 + 128 + 256 + 256 + 128)
