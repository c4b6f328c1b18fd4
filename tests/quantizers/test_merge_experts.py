"""Merged experts in 16 bits are stored as transformers reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.loaders import LoRAAdapter, load_adapter, open_checkpoint
from nybble.models import architecture_of
from nybble.quantizers import merge_adapter, quantize_checkpoint

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "shared_intermediate_size": 64,
        "layer_types": ["full_attention"] * 2,
        "position_embedding_type": "rope",
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
}
families = pytest.mark.parametrize("family", FAMILIES)
ATTENTION = {"target_modules": ["q_proj", "o_proj"]}
EXPERTS = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in built:
            built[family] = tmp_path_factory.mktemp("base") / family
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(built[family])
        return built[family]

    return build


def merged_by_peft(base: Path, adapter: Path, **options: Any) -> Any:
    """The base with a random adapter, which is saved to ``adapter``."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(adapter)
    return model.merge_and_unload().eval()


def read_by_transformers(folder: Path) -> Any:
    """The model, if the folder has its tensors and no others."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def tokens(model: Any) -> list[int]:
    prompt = torch.arange(3, 23)[None]
    return model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()


def merge(base: Path, adapter: Path, target: Path, format: str | None = None) -> dict[str, Tensor]:
    loaded = load_adapter(adapter, architecture_of(open_checkpoint(base).config))
    merge_adapter(base, loaded, target, format=format, progress=False)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("options", [ATTENTION, EXPERTS], ids=["attention", "experts"])
@families
def test_a_16_bit_base_keeps_the_tensors_that_it_has(
    base_of: Callable[[str], Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = base_of(family)
    expected = merged_by_peft(base, tmp_path / "adapter", **options)
    found = merge(base, tmp_path / "adapter", tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed
    attention = {name for name in found if "_proj.weight" in name and ".self_attn." in name}
    assert changed.isdisjoint(attention) if options is EXPERTS else changed <= attention
    model = read_by_transformers(tmp_path / "merged")
    wanted = expected.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    assert tokens(model) == tokens(expected)


@families
def test_a_4_bit_base_becomes_16_bits_that_transformers_reads(
    base_of: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """In 4 bits experts are separate, which some families are not in 16 bits."""
    base = base_of(family)
    quantize_checkpoint(base, tmp_path / "nf4", format="nf4", group_size=32, progress=False)
    before, after = (set(load_file(f / "model.safetensors")) for f in (base, tmp_path / "nf4"))
    routers = {name for name in before if ".router." in name or ".gate." in name}
    assert routers
    assert routers <= after
    nothing = LoRAAdapter({}, b"")
    merge_adapter(tmp_path / "nf4", nothing, tmp_path / "plain", format="bf16", progress=False)
    plain = read_by_transformers(tmp_path / "plain").state_dict()
    dense = read_by_transformers(base).state_dict()
    for name, tensor in plain.items():
        assert (tensor - dense[name]).norm() <= 0.15 * dense[name].norm(), name
    expected = merged_by_peft(tmp_path / "plain", tmp_path / "adapter", **EXPERTS).state_dict()
    merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", "bf16")
    for name, tensor in read_by_transformers(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-6, atol=1e-2)
        adapted = ".experts." in name and not name.endswith("_bias")
        assert torch.equal(tensor, plain[name]) != adapted, name
