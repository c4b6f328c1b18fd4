"""Adapters on a mixture's experts, in both of PEFT's forms, against peft."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import AdapterConfig
from nybble.loaders import AdapterError, load_adapter, open_checkpoint
from nybble.models import architecture_of

EXPERTS, HIDDEN, INTERMEDIATE = 4, 64, 48
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": INTERMEDIATE},
    "gpt_oss": {"intermediate_size": INTERMEDIATE, "head_dim": 16},
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def base_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family in built:
            return built[family]
        folder = built[family] = tmp_path_factory.mktemp("base") / family
        config = AutoConfig.for_model(
            family,
            vocab_size=300,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            **FAMILIES[family],
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model() / name, folder / name)
        return folder

    return build


def adapted(base: Path, folder: Path, *, seed: int = 0, **options: Any) -> Any:
    """A model with a random adapter by peft, which is saved to ``folder``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": BOTH} | options
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_target_parameters_give_what_peft_computes_also_in_company(
    reference: Any, base_of: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    base = base_of(family)
    models = {
        "both": adapted(base, tmp_path / "both", seed=1, use_rslora=True),
        "down": adapted(base, tmp_path / "down", seed=2, target_parameters=BOTH[1:]),
        "attention": adapted(
            base,
            tmp_path / "attention",
            seed=3,
            target_modules=["q_proj", "o_proj"],
            target_parameters=BOTH[:1],
            rank_pattern={"mlp.experts.gate_up_proj": 6},
        ),
    }
    checkpoint = open_checkpoint(base)
    expected = {name: reference.greedy(model, (20,), 24)[0] for name, model in models.items()}
    (plain,) = reference.greedy(reference.transformers_model(checkpoint), (20,), 24)
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=3, max_rank=8))
    try:
        for name in models:
            engine.load_adapter(name, str(tmp_path / name))
            alone = reference.alone(engine, expected[name].prompt, 24, adapter=name)
            assert alone == expected[name].tokens, name

        async def together() -> list[list[int]]:
            return await asyncio.gather(
                reference.collect(engine, "base", plain.prompt, max_tokens=24),
                *(
                    reference.collect(engine, name, each.prompt, max_tokens=24, adapter=name)
                    for name, each in expected.items()
                ),
            )

        found = asyncio.run(together())
        assert found == [plain.tokens, *(each.tokens for each in expected.values())]
    finally:
        engine.stop()


def as_modules(stacked: Path, to: Path) -> None:
    """The same adapter as peft saved it while experts were modules (Mixtral's, transformers 4)."""
    shutil.copytree(stacked, to)
    tensors = load_file(to / "adapter_model.safetensors")
    separate: dict[str, Tensor] = {}
    for layer in range(2):
        around = f"base_model.model.model.layers.{layer}.mlp.experts."
        modules = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts."
        for nested, names in (("base_layer.", ("w1", "w3")), ("", ("w2",))):
            a = tensors[f"{around}{nested}lora_A.weight"].view(EXPERTS, 4, -1)
            b = tensors[f"{around}{nested}lora_B.weight"]
            b = b.view(len(b), 4, EXPERTS)
            for share, name in enumerate(names):
                rows = b.chunk(len(names))[share]
                for expert in range(EXPERTS):
                    module = f"{modules}{expert}.{name}"
                    separate[f"{module}.lora_A.weight"] = a[expert].clone()
                    separate[f"{module}.lora_B.weight"] = rows[..., expert].clone()
    save_file(separate, to / "adapter_model.safetensors")
    config = json.loads((to / "adapter_config.json").read_text())
    config |= {"target_parameters": None, "target_modules": ["w1", "w2", "w3"]}
    (to / "adapter_config.json").write_text(json.dumps(config))


def test_experts_adapted_as_modules_give_the_same(
    reference: Any, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("mixtral")
    ((ids, expected),) = reference.greedy(adapted(base, tmp_path / "stacked"), (20,), 24)
    as_modules(tmp_path / "stacked", tmp_path / "modules")
    engine = reference.start(open_checkpoint(base), adapters=AdapterConfig(slots=1, max_rank=4))
    try:
        engine.load_adapter("a", str(tmp_path / "modules"))
        assert reference.alone(engine, ids, 24, adapter="a") == expected
    finally:
        engine.stop()


def load(base: Path, adapter: Path) -> Any:
    return load_adapter(adapter, architecture_of(AutoConfig.from_pretrained(base)))


def test_a_missing_expert_module_is_refused_by_name(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("mixtral")
    adapted(base, tmp_path / "stacked")
    as_modules(tmp_path / "stacked", tmp_path / "modules")
    path = tmp_path / "modules" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_A.weight"]
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"no lora_A for model\.layers\.1\..*experts\.2\.w3"):
        load(base, tmp_path / "modules")


def test_tensors_for_another_number_of_experts_are_refused_by_name(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("mixtral")
    adapted(base, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    tensors[name] = tensors[name][:12].clone()
    save_file(tensors, path)
    message = (
        r"layers\.1\.mlp\.experts\.down_proj needs lora_A \(16, 48\) .* for 4 experts and rank"
    )
    with pytest.raises(AdapterError, match=message):
        load(base, tmp_path / "a")


def test_other_parameters_are_refused_by_name(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("mixtral")
    adapted(base, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_parameters"] = [*BOTH, "mlp.gate.weight"]
    path.write_text(json.dumps(config))
    with pytest.raises(
        AdapterError, match=r"target_parameters has 'mlp\.gate\.weight', which names"
    ):
        load(base, tmp_path / "a")


def test_values_that_are_not_finite_are_refused_by_name(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("mixtral")
    adapted(base, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts\.lora_B\.weight has values"):
        load(base, tmp_path / "a")


def test_magnitudes_on_experts_are_refused_by_name(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("mixtral")
    adapted(base, tmp_path / "stacked")
    as_modules(tmp_path / "stacked", tmp_path / "modules")
    path = tmp_path / "modules" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "lora_B" in name]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = torch.ones(len(tensors[name]))
    save_file(tensors, path)
    config = json.loads((tmp_path / "modules" / "adapter_config.json").read_text())
    config["use_dora"] = True
    (tmp_path / "modules" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"a lora_magnitude_vector for the expert model\.layers"):
        load(base, tmp_path / "modules")


def test_all_linear_of_peft_includes_the_router(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of Mixtral in transformers 5, as a parameter; named targets do not, and are served."""
    base = base_of("mixtral")
    architecture = architecture_of(open_checkpoint(base).config)
    adapted(base, tmp_path / "all", target_modules="all-linear", target_parameters=None)
    with pytest.raises(
        AdapterError, match=r"for model\.layers\.0\.mlp\.gate, which weighs experts"
    ):
        load_adapter(tmp_path / "all", architecture)
    adapted(base, tmp_path / "named", target_modules=["q_proj", "o_proj"])
    assert len(load_adapter(tmp_path / "named", architecture).modules) == 2 * (2 + 3 * EXPERTS)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("mixtral", "mlp.gate"),
        ("mixtral", "block_sparse_moe.gate"),
        ("gpt_oss", "mlp.router"),
        ("qwen2_moe", "mlp.shared_expert_gate"),
    ],
)
def test_an_adapter_on_a_router_is_refused_with_what_to_do(
    tmp_path: Path, family: str, module: str
) -> None:
    """As peft makes them with `all-linear` if a router or a gate is a linear layer."""
    architecture = architecture_of(AutoConfig.for_model(family, num_hidden_layers=1))
    settings = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    key = f"base_model.model.model.layers.0.{module}.lora_A.weight"
    save_file({key: torch.ones(4, 64)}, tmp_path / "adapter_model.safetensors")
    leaf = module.rpartition(".")[2]
    with pytest.raises(
        AdapterError,
        match=rf"for model\.layers\.0\.{module}, which weighs experts: .*"
        rf"without {leaf}, and not with all-linear; or serve what peft's merge_and_unload",
    ):
        load_adapter(tmp_path, architecture)
