"""Experts of a checkpoint: separate or stacked tensors, all that config.json says and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.memory import gib, memory_explained
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.models import UnsupportedModelError, architecture_of
from nybble.quantizers import quantize_checkpoint

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "granitemoe": {"num_local_experts": 3},
    "phimoe": {"num_local_experts": 3},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model as transformers writes it: in the published names, or in its own."""

    def build(family: str, *, published: bool = True, **settings: Any) -> Path:
        config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | settings)
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("experts") / family
        AutoModelForCausalLM.from_config(config).save_pretrained(
            folder, save_original_format=published
        )
        return folder

    return build


def changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with other tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def weights(folder: Path) -> dict[str, Tensor]:
    found = {}
    for name, weight in open_checkpoint(folder).weights():
        found[name] = weight if isinstance(weight, Tensor) else weight.weight  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_and_separate_tensors_are_the_same_weights(
    folder_of: Callable[..., Path], family: str
) -> None:
    published, own = (folder_of(family, published=p) for p in (True, False))
    names = [set(load_file(folder / "model.safetensors")) for folder in (published, own)]
    assert names[0] != names[1], "transformers writes one form only"
    expected, found = weights(published), weights(own)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are listed by Linux")
@pytest.mark.parametrize("published", [True, False])
def test_the_tensors_of_a_file_share_a_mapping(
    folder_of: Callable[..., Path], published: bool
) -> None:
    """Each by itself, those of a large mixture are more than Linux allows a process."""
    folder = folder_of("qwen3_moe", published=published)
    found = dict(open_checkpoint(folder).weights())
    lines = Path("/proc/self/maps").read_text().splitlines()
    # A private and a writable mapping may lie side by side in two lines.
    assert 1 <= sum(str(folder) in line for line in lines) <= 2 < len(found)


@pytest.mark.parametrize("published", [True, False])
def test_the_memory_of_a_mixture_is_known_from_its_headers(
    folder_of: Callable[..., Path], published: bool
) -> None:
    folder = folder_of("mixtral", published=published)
    experts, routers = 2 * 3 * 3 * 32 * 48, 2 * 3 * 32
    others = sum(weight.numel() for weight in weights(folder).values()) - experts - routers
    rest = 2 * others + 4 * routers
    assert weight_bytes(folder, torch.bfloat16) == rest + 2 * experts
    attention = 2 * (32 * 32 * 2 + 2 * 16 * 32)
    in_4_bits = weight_bytes(folder, torch.bfloat16, layers="4bit")
    assert in_4_bits == round(rest - 2 * attention + (experts + attention) * (1 / 2 + 4 / 64))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mixture_larger_than_the_gpu_is_refused_before_anything_is_loaded(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    checkpoint = open_checkpoint(folder_of("qwen3_moe"))
    own = weight_bytes(checkpoint.folder, torch.bfloat16) // ranks
    config = EngineConfig(
        device="cuda", dtype=torch.bfloat16, kv_cache_bytes=1 << 20, tensor_parallel_size=ranks
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (own - 2048, own))
    loaded = False
    with pytest.raises(ValueError, match="weights take") as refused:  # noqa: SIM117
        with memory_explained(checkpoint, config):
            loaded = True
    assert not loaded
    assert f"weights take {gib(own)}" in str(refused.value)
    assert f"{gib(2048)} more than the {gib(own - 2048)} that are free" in str(refused.value)
    assert ("on each of 2 GPUs" in str(refused.value)) == (ranks == 2)
    for way in ("--quantize nf4", "--tensor-parallel-size", "--device cpu"):
        assert way in str(refused.value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (own, own))
    with memory_explained(checkpoint, config):
        loaded = True
    assert loaded


def test_a_missing_expert_is_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj"
    folder = changed(folder_of("qwen3_moe"), tmp_path / "m", lambda t: t.pop(name + ".weight"))
    with pytest.raises(CheckpointError, match=rf"no tensor of {name}: config.json says 3 experts"):
        list(open_checkpoint(folder).weights())


def test_an_expert_too_many_is_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.w1"

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name.format(3) + ".weight"] = tensors[name.format(2) + ".weight"].clone()

    folder = changed(folder_of("mixtral"), tmp_path / "m", add)
    with pytest.raises(CheckpointError, match=rf"has {name.format(3)}, but config.json says 3"):
        list(open_checkpoint(folder).weights())


def test_experts_both_stacked_and_separate_are_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(3, 32, 48)

    folder = changed(folder_of("qwen3_moe"), tmp_path / "m", add)
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight twice: also in model\.layers",
    ):
        list(open_checkpoint(folder).weights())


def test_stacked_experts_of_another_count_are_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.0.block_sparse_moe.input_linear.weight"

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:2].clone()

    folder = changed(folder_of("granitemoe"), tmp_path / "m", cut)
    with pytest.raises(CheckpointError, match=rf"{name} holds 2 experts, but config.json says 3"):
        list(open_checkpoint(folder).weights())


def test_stacked_rows_that_are_not_two_layers_are_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.0.block_sparse_moe.input_linear.weight"

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:, 1:].clone()

    folder = changed(folder_of("granitemoe"), tmp_path / "m", cut)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(3, 95, 32\)"):
        list(open_checkpoint(folder).weights())


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "nf4"])
def test_quantized_experts_missing_doubled_or_too_many_are_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    source = folder_of("qwen3_moe", moe_intermediate_size=64)
    whole = tmp_path / "whole"
    quantize_checkpoint(source, whole, format=format, group_size=32, progress=False)
    module = "model.layers.1.mlp.experts.{}.down_proj"

    def of(tensors: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
        start = module.format(expert) + "."
        return {name.removeprefix(start): t for name, t in tensors.items() if start in name}

    def take(tensors: dict[str, Tensor]) -> None:
        for leaf in of(tensors, 2):
            del tensors[f"{module.format(2)}.{leaf}"]

    def add(tensors: dict[str, Tensor]) -> None:
        for leaf, tensor in of(tensors, 2).items():
            tensors[f"{module.format(3)}.{leaf}"] = tensor.clone()

    def double(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(3, 32, 64)

    for change, reason in (
        (take, f"has no tensor of {module.format(2)}: config.json says 3 experts"),
        (add, f"has {module.format(3)}, but config.json says 3 experts"),
        (double, rf"(has|reads the tensor) {module.format(0)}\.weight( twice|: the checkpoint's)"),
    ):
        folder = changed(whole, tmp_path / change.__name__, change)
        with pytest.raises(CheckpointError, match=reason):
            list(open_checkpoint(folder).weights())


def test_a_missing_router_is_refused_by_name(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.gate.weight"
    folder = changed(folder_of("qwen3_moe"), tmp_path / "m", lambda t: t.pop(name))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ValueError, match=f"has no tensor {name}"):
        Decoder(
            architecture_of(checkpoint.config),
            checkpoint.weights(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_model_len=16,
        )


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 4}, "a token uses 4 experts, but there are 3"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, which is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, which is not supported for olmoe"),
        ("deepseek_v2", {"topk_method": "any"}, "topk_method is 'any'; supported are greedy and g"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True, which is not supported"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, r"mlp_layer_types is \['dense'\], expe"),
    ],
)
def test_mixtures_that_are_not_supported_are_refused_before_anything_is_read(
    tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    settings = COMMON | FAMILIES.get(family, {}) | settings
    config = AutoConfig.for_model(family, **settings).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))  # and no weights
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(tmp_path)


def test_a_mixture_on_a_gpu_in_float32_is_refused_before_anything_is_read(
    folder_of: Callable[..., Path],
) -> None:
    checkpoint = open_checkpoint(folder_of("mixtral"))
    with pytest.raises(
        UnsupportedModelError, match="mixtral models are mixtures of experts, which cuda"
    ):
        Decoder(
            architecture_of(checkpoint.config),
            iter(()),
            device=torch.device("cuda"),
            dtype=torch.float32,
            max_model_len=16,
        )


@pytest.mark.parametrize(("extra", "order"), [("a", "ab"), ("c", "bc")])
def test_a_tensor_in_two_files_is_the_one_that_the_index_names_or_refused(
    folder_of: Callable[..., Path], tmp_path: Path, extra: str, order: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(folder_of("qwen3_moe"), folder)
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    tensors = load_file(folder / "b.safetensors")
    expert, router = (f"model.layers.1.mlp.{n}" for n in ("experts.2.down_proj", "gate"))
    doubled = {f"{each}.weight": tensors[f"{each}.weight"] + 1 for each in (expert, router)}
    save_file(doubled, folder / f"{extra}.safetensors")
    where = " and in ".join(f".*/{each}.safetensors" for each in order)
    with pytest.raises(CheckpointError, match=f"the tensor model.layers.1.mlp.* is in {where}"):
        list(open_checkpoint(folder).weights())
    places = dict.fromkeys(tensors, "b.safetensors") | {f"{router}.weight": f"{extra}.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found: dict[str, Any] = dict(open_checkpoint(folder).weights())
    assert torch.equal(found[expert].weight, tensors[f"{expert}.weight"])
    assert torch.equal(found[f"{router}.weight"], doubled[f"{router}.weight"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.T.contiguous(), r"has shape \(32, 48\), config.json says \(48, 32\)"),
        (lambda t: t[1:].clone(), r"has shape \(47, 32\), config.json says \(48, 32\)"),
        (lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, expected 16 or 32 bits"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_refused_by_name(
    folder_of: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[Tensor], Tensor],
    reason: str,
) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def other(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    folder = changed(folder_of("qwen3_moe"), tmp_path / "m", other)
    with pytest.raises(CheckpointError, match=f"{name} {reason}"):
        list(open_checkpoint(folder).weights())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"n_group": 8}, "8 experts in 8 groups: a group's score is that of its best two"),
        ({"topk_group": 5}, "8 experts in 4 groups, of which 5 are chosen"),
        ({"topk_group": 1}, "4 experts are chosen of the 2 that can be"),
    ],
)
def test_groups_that_experts_cannot_be_in_are_refused(
    settings: dict[str, Any], reason: str
) -> None:
    groups = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    architecture_of(AutoConfig.for_model("deepseek_v3", **groups))
    with pytest.raises(UnsupportedModelError, match=reason):
        architecture_of(AutoConfig.for_model("deepseek_v3", **groups | settings))
