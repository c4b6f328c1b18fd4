"""Checkpoint folders as they are found: in shards, with either config file, partly quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import Checkpoint, CheckpointError, open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.quantizers import quantize_checkpoint


@pytest.fixture
def gptq(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    folder = tmp_path / "gptq"
    quantize_checkpoint(tiny_model(), folder, format="gptq", group_size=64, progress=False)
    return folder


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    found = {}
    for name, weight in checkpoint.weights():
        if isinstance(weight, PackedWeight):
            found[name] = weight.dequantize()
        else:
            found[name] = weight.weight if isinstance(weight, DenseWeight) else weight
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def in_shards(folder: Path) -> dict[str, str]:
    """Spread a folder's tensors over three files, neighbours apart; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {n: f"part-{i % 3}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_checkpoint_is_the_same_model(gptq: Path) -> None:
    whole = values(open_checkpoint(gptq))
    in_shards(gptq)
    assert_same(values(open_checkpoint(gptq)), whole)


def test_a_shard_that_is_not_there_is_named(gptq: Path) -> None:
    in_shards(gptq)
    (gptq / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names part-1\.safetensors: not there"):
        values(open_checkpoint(gptq))


def test_a_tensor_missing_from_its_shard_is_named(gptq: Path) -> None:
    name, file = next(iter(in_shards(gptq).items()))
    save_file({"other": torch.zeros(1)}, gptq / file)
    with pytest.raises(CheckpointError, match=f"{file} has no tensor {name}"):
        values(open_checkpoint(gptq))


def test_a_folder_with_two_models_is_refused(gptq: Path) -> None:
    """transformers would read the single file, and we the shards."""
    whole = values(open_checkpoint(gptq))
    single = (gptq / "model.safetensors").read_bytes()
    in_shards(gptq)
    (gptq / "model.safetensors").write_bytes(single)
    with pytest.raises(
        CheckpointError,
        match=r"two models: model\.safetensors, and the files that model\.safetensors\.index\.json "
        r"names, such as part-0\.safetensors; remove",
    ):
        values(open_checkpoint(gptq))
    index = {
        "weight_map": dict.fromkeys(load_file(gptq / "model.safetensors"), "model.safetensors")
    }
    (gptq / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(values(open_checkpoint(gptq)), whole)


@pytest.mark.parametrize("family", ["qwen2", "llama", "lfm2"])
def test_a_tied_matrix_may_have_the_output_layers_name(
    tmp_path: Path, tiny_model: Callable[..., Path], family: str
) -> None:
    """As safetensors' save_model writes it, and transformers reads it."""
    usual = tiny_model(family=family, tie_word_embeddings=True)
    folder = Path(shutil.copytree(usual, tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(usual, dtype=torch.bfloat16)
    save_model(model, str(folder / "model.safetensors"), {"format": "pt"})
    names = load_file(folder / "model.safetensors").keys()
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    found, expected = values(open_checkpoint(folder)), values(open_checkpoint(usual))
    assert_same(found, expected)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(read.get_input_embeddings().weight, found["model.embed_tokens.weight"])
    for head in (None, "int8"):
        size = weight_bytes(usual, torch.bfloat16, head=head)  # type: ignore[arg-type]
        assert weight_bytes(folder, torch.bfloat16, head=head) == size  # type: ignore[arg-type]
    for source, copy in ((usual, tmp_path / "a"), (folder, tmp_path / "b")):
        quantize_checkpoint(source, copy, format="nf4", progress=False)
    assert_same(values(open_checkpoint(tmp_path / "b")), values(open_checkpoint(tmp_path / "a")))


@pytest.mark.parametrize("tied", [False, True])
def test_an_index_may_name_what_is_not_read(
    tmp_path: Path, tiny_model: Callable[..., Path], tied: bool
) -> None:
    """As of files that were written again without it; transformers reads them too."""
    folder = Path(shutil.copytree(tiny_model(tie_word_embeddings=tied), tmp_path / "m"))
    whole = values(open_checkpoint(folder))
    weight_map = in_shards(folder)
    weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = "part-0.safetensors"
    weight_map |= {"lm_head.weight": "part-1.safetensors"} if tied else {}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(values(open_checkpoint(folder)), whole)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(read.get_input_embeddings().weight, whole["model.embed_tokens.weight"])
    weight_map["model.layers.0.self_attn.q_proj.scales"] = "part-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"part-0\.safetensors has no tensor .*q_proj\.scales"
    ):
        values(open_checkpoint(folder))


def test_settings_may_be_in_quantize_config_json(gptq: Path) -> None:
    """As AutoGPTQ wrote them, without quant_method."""
    whole = values(open_checkpoint(gptq))
    config = json.loads((gptq / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (gptq / "config.json").write_text(json.dumps(config))
    (gptq / "quantize_config.json").write_text(json.dumps(settings))
    assert_same(values(open_checkpoint(gptq)), whole)


def test_layers_left_in_16_bits_are_read_as_they_are(
    gptq: Path, tiny_model: Callable[..., Path]
) -> None:
    """modules_to_not_convert, in AWQ's words; the tensors say it themselves."""
    module = "model.layers.1.mlp.down_proj"
    dense = load_file(tiny_model() / "model.safetensors")[module + ".weight"]

    def leave_out(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{module}.{part}"]
        tensors[module + ".weight"] = dense

    edit_tensors(gptq, leave_out)
    assert torch.equal(values(open_checkpoint(gptq))[module], dense)


def test_one_projection_of_three_in_16_bits_is_not_fused(
    gptq: Path, tiny_model: Callable[..., Path]
) -> None:
    attention = "model.layers.0.self_attn."
    dense = load_file(tiny_model() / "model.safetensors")[attention + "k_proj.weight"]

    def leave_out(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{attention}k_proj.{part}"]
        tensors[attention + "k_proj.weight"] = dense

    edit_tensors(gptq, leave_out)
    found = dict(open_checkpoint(gptq).weights())
    assert isinstance(found[attention + "q_proj"], PackedWeight)
    assert isinstance(found[attention + "k_proj"], DenseWeight)


def test_a_quantized_output_layer_is_packed(tmp_path: Path, gptq: Path) -> None:
    def quantized_head(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        prefix = "model.layers.0.mlp.gate_proj."
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.replace(prefix, "lm_head.")] = tensors[name].clone()

    edit_tensors(gptq, quantized_head)
    assert isinstance(dict(open_checkpoint(gptq).weights())["lm_head"], PackedWeight)


def test_a_missing_part_of_a_quantized_layer_is_named(gptq: Path) -> None:
    name = "model.layers.0.mlp.up_proj.scales"

    def leave_out(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    edit_tensors(gptq, leave_out)
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        values(open_checkpoint(gptq))


def test_tensors_of_another_format_are_refused(gptq: Path, tmp_path: Path) -> None:
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (gptq / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=r"nothing here reads the tensor .*: the checkpoint's format is fp4",
    ):
        values(open_checkpoint(gptq))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("settings", "sound"),
    [
        (AWQ, False),
        (NF4, False),
        (FP8, False),
        # The output layer is 16-bit in nearly every checkpoint: naming it says nothing of the rest.
        (AWQ | {"modules_to_not_convert": ["lm_head"]}, False),
        (AWQ | {"modules_to_not_convert": ["model.layers"]}, True),
        (None, True),
    ],
    ids=str,
)
def test_a_quantization_that_no_tensor_has_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], settings: dict[str, object] | None, sound: bool
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    if sound:
        assert_same(values(open_checkpoint(folder)), values(open_checkpoint(tiny_model())))
        return
    with pytest.raises(CheckpointError, match=r"quant_method '\w+'\), but no tensor is: remove"):
        values(open_checkpoint(folder))


def test_codes_that_are_not_int32_are_refused(gptq: Path) -> None:
    name = "model.layers.0.mlp.up_proj.qweight"

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].long()

    edit_tensors(gptq, widen)
    with pytest.raises(CheckpointError, match=f"{name} is torch.int64"):
        values(open_checkpoint(gptq))


def test_a_folder_without_config_and_one_that_is_no_json_are_named(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("tensor", "hint"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "has no quantization_config"),
        ("model.layers.1.mlp.down_proj.qweight", "it is a tensor of gptq or awq"),
        ("model.layers.1.self_attn.o_proj.lora_A", "has no quantization_config"),
    ],
)
def test_a_tensor_that_nothing_reads_is_named(
    tmp_path: Path, tiny_model: Callable[..., Path], tensor: str, hint: str
) -> None:
    """Before any weight is read: what it means is not known, so the model would be another one."""
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    edit_tensors(folder, lambda tensors: tensors.update({tensor: torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=f"nothing here reads the tensor {tensor}: .*{hint}"):
        next(open_checkpoint(folder).weights())


def test_frequencies_that_old_checkpoints_carry_are_passed_over(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    whole = values(open_checkpoint(folder))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert_same(values(open_checkpoint(folder)), whole)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_bias_that_the_family_has_is_missed(
    tmp_path: Path, gptq: Path, tiny_model: Callable[..., Path], quantized: bool
) -> None:
    folder = gptq if quantized else Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    name = "model.layers.1.self_attn.k_proj.bias"

    def leave_out(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    edit_tensors(folder, leave_out)
    with pytest.raises(CheckpointError, match=f"has no tensor {name}, which qwen2 models have"):
        next(open_checkpoint(folder).weights())


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "lm_head"])
def test_a_bias_that_config_json_does_not_speak_of_may_only_be_zero(
    tmp_path: Path, gptq: Path, tiny_model: Callable[..., Path], module: str, quantized: bool
) -> None:
    """transformers leaves it out; some GPTQ writers store zeros for every layer."""
    folder = gptq if quantized else Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    name = module + ".bias"
    rows = 128 if module.endswith("down_proj") else 320

    def add(value: float) -> None:
        bias = torch.zeros(rows, dtype=torch.bfloat16)
        bias[-1] = value
        edit_tensors(folder, lambda tensors: tensors.update({name: bias}))

    add(0.0)
    assert module in values(open_checkpoint(folder))
    add(1e-3)
    with pytest.raises(CheckpointError, match=f"a tensor {name} that is not zero, but by its con"):
        values(open_checkpoint(folder))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "module", ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj", "lm_head"]
)
def test_a_linear_layer_that_is_not_there_is_named_as_the_file_would(
    tmp_path: Path, gptq: Path, tiny_model: Callable[..., Path], module: str, quantized: bool
) -> None:
    """Not as what the engine makes of several."""
    folder = gptq if quantized else Path(shutil.copytree(tiny_model(), tmp_path / "m"))

    def leave_out(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(module + ".")]:
            del tensors[name]

    edit_tensors(folder, leave_out)
    with pytest.raises(CheckpointError, match=rf"{folder} has no tensor (of )?{module}\b"):
        values(open_checkpoint(folder))


def test_quantized_weights_of_another_size_are_named(gptq: Path) -> None:
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(
        CheckpointError,
        match=rf"{gptq}: model.layers.0.self_attn.k_proj has shape \(64, 128\), config.json says",
    ):
        values(open_checkpoint(gptq))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "part-1.safetensors", "model.safetensors.index.json"]
)
def test_a_pointer_of_git_lfs_is_named_as_one(gptq: Path, file: str) -> None:
    if file != "model.safetensors":
        in_shards(gptq)
    (gptq / file).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{gptq / file} is a git-lfs pointer.*git lfs pull"):
        values(open_checkpoint(gptq))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_norm_or_the_embedding_that_is_not_there_is_named(
    tmp_path: Path, tiny_model: Callable[..., Path], name: str
) -> None:
    """A model with one of two norms of heads would answer, and be another one."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.for_model("qwen3", vocab_size=32, num_attention_heads=4, **sizes)
    config.num_key_value_heads = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    def leave_out(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    edit_tensors(tmp_path, leave_out)
    with pytest.raises(CheckpointError, match=f"has no tensor {name}, which qwen3 models have"):
        next(open_checkpoint(tmp_path).weights())
