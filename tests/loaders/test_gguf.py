"""GGUF files: blocks against gguf's own dequantization, models against transformers' GGUF loading.

The files are written here with gguf's writer, as llama.cpp's converter names and permutes tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import CheckpointError, ModelNotFoundError, open_checkpoint, resolve_model
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.formats.gguf_blocks import BLOCK_TYPES
from nybble.loaders.gguf.config import FAMILIES
from nybble.loaders.gguf.dense import convert_gguf
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import architecture_of
from nybble.quantizers.packed_cache import entries
from nybble.quantizers.prepare import prepare_checkpoint

# Bytes of a block at which its float16 scales and minima are.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Bytes of random blocks with plausible scales, one of them 0."""
    random, block = np.random.default_rng(seed), BLOCK_TYPES[name]
    found = random.integers(0, 256, (rows * columns // block.weights, block.nbytes), np.uint8)
    for at in HALVES[name]:
        scales = random.normal(scale=0.01, size=(len(found), 1)).astype(np.float16)
        found[:, at : at + 2] = scales.view(np.uint8)
    for at in HALVES[name][:1]:
        found[1, at : at + 2] = 0
    if name == "MXFP4":
        found[:, 0] = random.integers(0, 140, len(found))
    return found.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_have_the_weights_that_gguf_gives_them(name: str) -> None:
    stored = random_blocks(name, 40, 1024)
    expected = torch.from_numpy(gguf.dequantize(stored, GGMLQuantizationType[name]))
    weight = BLOCK_TYPES[name].packed(torch.from_numpy(stored))
    if BLOCK_TYPES[name].is_rounded:
        # d · q + m against d · (q − z): the largest of d · q, m and z · d is rounded each time.
        magnitude = expected.abs().view(40, -1, BLOCK_TYPES[name].group).amax(-1, keepdim=True)
        error = (weight.dequantize() - expected).view(40, -1, BLOCK_TYPES[name].group).abs()
        assert (error <= magnitude * 2**-19).all()
    else:
        assert torch.equal(weight.dequantize(), expected)
    levels = weight.levels.nbytes
    assert weight.nbytes - levels == BLOCK_TYPES[name].packed_bytes(40, stored.shape[1])


def test_the_sizes_of_blocks_are_those_of_gguf() -> None:
    for name, block in BLOCK_TYPES.items():
        sizes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert (block.weights, block.nbytes) == sizes


def test_many_rows_are_unpacked_in_parts() -> None:
    stored = random_blocks("Q4_0", 5000, 32)
    expected = torch.from_numpy(gguf.dequantize(stored, GGMLQuantizationType.Q4_0))
    weight = BLOCK_TYPES["Q4_0"].packed(torch.from_numpy(stored))
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize(
    ("name", "scale"), [("Q8_0", 5000.0), ("Q4_0", float("inf")), ("Q6_K", float("nan"))]
)
def test_scales_that_cannot_be_kept_are_refused(name: str, scale: float) -> None:
    stored = random_blocks(name, 2, 256)
    at = HALVES[name][0]
    stored[0, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="a scale is not finite, or too large"):
        BLOCK_TYPES[name].packed(torch.from_numpy(stored))


SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIED = {"tie_word_embeddings": True}
THETA = {"rope_type": "default", "rope_theta": 5000.0}
# What each architecture's model has beside SIZES, and its file beside the common keys.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"rope_parameters": THETA}, {"rope.freq_base": 5000.0}),
    "qwen2": (TIED, {}),
    "qwen3": ({"head_dim": 128}, {}),  # which transformers takes for granted
    "gemma": (TIED | {"head_dim": 32}, {}),
    "gemma2": (
        {
            **TIED,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
        },
        {
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        {
            **TIED,
            "num_hidden_layers": 6,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
            },
        },
        {
            "attention.sliding_window": 24,
            "rope.freq_base": 5e4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": (
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
        {"rope.freq_base": 5000.0, "rope.dimension_count": 8},
    ),
    "starcoder2": ({}, {}),
    "nemotron": (
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
        {"rope.freq_base": 5000.0, "rope.dimension_count": 8},
    ),
    "granite": (
        {
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
        {"embedding_scale": 1.5, "attention.scale": 0.3, "residual_scale": 0.7, "logit_scale": 0.5},
    ),
    "smollm3": (
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "rope_parameters": THETA},
        {"rope.freq_base": 5000.0},
    ),
    "arcee": ({"hidden_act": "relu2"}, {}),
    "olmo2": ({}, {}),
    "mistral3": (
        {
            "rope_parameters": {
                **THETA,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            }
        },
        {
            "rope.freq_base": 5000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.5,
        },
    ),
    "exaone4": (
        {"num_hidden_layers": 4, "sliding_window": 24, "rope_parameters": THETA},
        {"attention.sliding_window": 24, "rope.freq_base": 5000.0},
    ),
    "chatglm": (
        {"attention_bias": True, "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
        {"rope.freq_base": 5000.0, "rope.dimension_count": 8},
    ),
    "glm4": (
        {"attention_bias": True, "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
        {"rope.freq_base": 5000.0, "rope.dimension_count": 8},
    ),
    "ernie4_5": ({"rope_parameters": THETA}, {"rope.freq_base": 5000.0}),
    "hunyuan-dense": (
        {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 1.0, "alpha": 10.0}},
        {"rope.freq_base": 5000.0 * 10.0 ** (16 / 14), "rope.scaling.type": "none"},
    ),
    "cohere2": (
        {
            **TIED,
            "num_hidden_layers": 4,
            "logit_scale": 0.5,
            "sliding_window": 24,
            "rope_parameters": THETA,
        },
        {"attention.sliding_window": 24, "logit_scale": 0.5, "rope.freq_base": 5000.0},
    ),
    "qwen2moe": (
        {
            **{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
            **{"shared_expert_intermediate_size": 64, "norm_topk_prob": False},
        },
        {
            **{"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 96},
            "expert_shared_feed_forward_length": 64,
        },
    ),
    "qwen3moe": (
        {
            **{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
            "norm_topk_prob": True,
        },
        {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 96},
    ),
    "olmoe": (
        {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": False},
        {"expert_count": 3, "expert_used_count": 2},
    ),
    "gpt-oss": (
        {
            **{"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 24},
            "rope_parameters": {
                **THETA,
                **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            },
        },
        {
            **{"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 128},
            **{"attention.sliding_window": 24, "rope.freq_base": 5000.0},
            **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            "rope.scaling.original_context_length": 64,
        },
    ),
    "apertus": (
        {"rope_parameters": THETA, "hidden_act": "xielu"},
        {"rope.freq_base": 5000.0},
    ),
    "seed_oss": ({"attention_bias": True, "attention_out_bias": False}, {}),
    "command-r": (
        TIED | {"logit_scale": 0.5, "use_qk_norm": False, "rope_parameters": THETA},
        {"logit_scale": 0.5, "rope.scaling.type": "none", "rope.freq_base": 5000.0},
    ),
}
# Those that transformers reads from GGUF files as well. (Its Gemma 3 has other rotary settings.)
READ_BY_TRANSFORMERS = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "nemotron"),
)


def llama_cpp_permutes(weight: Tensor, heads: int) -> Tensor:
    halves = weight.view(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def separated(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, with gate and up of its experts apart and rows first, as the converter
    has them. Those of a learned activation are no tensors of the file."""
    transposed = model.config.model_type == "gpt_oss"
    for name, tensor in model.state_dict().items():
        if ".act_fn." in name:
            continue
        if name.endswith(".sinks"):
            name += ".weight"
        if ".experts." in name:
            name = name.removesuffix("_bias") + (".bias" if name.endswith("_bias") else ".weight")
            if transposed and tensor.ndim == 3:
                tensor = tensor.mT
        if ".experts.gate_up_proj" not in name:
            yield name, tensor
            continue
        halves = (tensor[:, 0::2], tensor[:, 1::2]) if transposed else tensor.chunk(2, dim=1)
        for part, rows in zip(("gate_proj", "up_proj"), halves, strict=True):
            yield name.replace("gate_up_proj", part), rows


def stored_tensors(architecture: str, model: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under GGUF names, changed as llama.cpp's converter does."""
    family, config = FAMILIES[architecture], model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, tensor in separated(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if architecture in ("llama", "granite", "smollm3", "arcee", "mistral3"):
            if ".q_proj." in name:
                tensor = llama_cpp_permutes(tensor, config.num_attention_heads)
            if ".k_proj." in name:
                tensor = llama_cpp_permutes(tensor, config.num_key_value_heads)
        if family.norm_offset and name.endswith("norm.weight"):
            tensor = tensor + 1
        yield found, tensor


def tokenizer_fields(writer: GGUFWriter, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def add_learned_activations(writer: GGUFWriter, model: Any) -> None:
    functions = [layer.mlp.act_fn for layer in model.model.layers]
    for leaf in ("alpha_p", "alpha_n", "beta", "eps"):
        numbers = [getattr(function, leaf).item() for function in functions]
        getattr(writer, f"add_xielu_{leaf}")(numbers)


def write_gguf(
    file: Path,
    architecture: str,
    model: Any,
    tokenizer: Path,
    *,
    kind: str = "F32",
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Matrices are stored in blocks of ``kind``, everything else in float32."""
    config = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_name("tiny")
    common = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or 16,
        "attention.value_length": getattr(config, "head_dim", None) or 16,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    if architecture in ("starcoder2", "nemotron", "command-r", "cohere2"):
        common["attention.layer_norm_epsilon"] = common.pop("attention.layer_norm_rms_epsilon")
    for key, value in (common | MODELS[architecture][1] | dict(keys or {})).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    if getattr(config, "hidden_act", None) == "xielu":
        add_learned_activations(writer, model)
    tokenizer_fields(writer, tokenizer)
    for name, tensor in stored_tensors(architecture, model):
        values = tensor.float().numpy()
        # Routers and the biases of experts are kept whole.
        is_matrix = tensor.ndim > 1 and "ffn_gate_inp" not in name and name.endswith(".weight")
        if is_matrix and kind != "F32":
            raw = gguf.quantize(values, GGMLQuantizationType[kind])
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def random_model(architecture: str) -> Any:
    settings = SIZES | MODELS[architecture][0]
    settings[FAMILIES[architecture].eps] = 1e-5
    return random_weights(AutoConfig.for_model(FAMILIES[architecture].model_type, **settings))


def random_weights(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by transformers' names, dequantized."""
    checkpoint, found = open_checkpoint(folder), {}
    members = dict(architecture_of(checkpoint.config).fused.values())
    linears = architecture_of(checkpoint.config).linears
    for name, weight in checkpoint.weights():
        if isinstance(weight, Tensor):
            found[name] = weight.float()
            continue
        dense = weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight.float()
        parts = members.get(name, (name,))
        sizes = [linears[part].out if part in linears else len(dense) for part in parts]
        for part, rows in zip(parts, dense.split(sizes), strict=True):
            found[part + ".weight"] = rows
        if weight.bias is not None:
            for part, rows in zip(parts, weight.bias.float().split(sizes), strict=True):
                found[part + ".bias"] = rows
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_a_file_is_the_model_that_was_converted(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any, architecture: str
) -> None:
    model = random_model(architecture)
    file = write_gguf(tmp_path / "model.gguf", architecture, model, tiny_model())
    folder = resolve_model(str(file))
    model.save_pretrained(tmp_path / "converted")
    found, expected = weights_of(folder), weights_of(tmp_path / "converted")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    ours = reference.our_logits(open_checkpoint(folder), ids, torch.float32)
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


def test_olmo_3_is_olmo_2_with_windows(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers have one is in the file, layer by layer; the others scale their frequencies."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    scaled = {
        **THETA,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
    }
    config = AutoConfig.for_model(
        "olmo3",
        **SIZES,
        rms_norm_eps=1e-5,
        sliding_window=24,
        layer_types=kinds,
        rope_parameters={"full_attention": scaled, "sliding_attention": THETA},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    keys = {
        "attention.sliding_window": 24,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
        "rope.freq_base": 5000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.attn_factor": 1.2,
        "rope.scaling.original_context_length": 64,
    }
    file = write_gguf(tmp_path / "model.gguf", "olmo2", model, tiny_model(), keys=keys)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    checkpoint = open_checkpoint(resolve_model(str(file)))
    assert checkpoint.config.model_type == "olmo3"
    ours = reference.our_logits(checkpoint, ids, torch.float32)
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


def test_mixtral_is_llama_with_experts(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any
) -> None:
    """Rows of queries and keys are permuted as Llama's are."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "mixtral", **SIZES, **experts, rms_norm_eps=1e-5, sliding_window=None, rope_parameters=THETA
    )
    model = random_weights(config)
    keys = {"expert_count": 3, "expert_used_count": 2}
    file = write_gguf(tmp_path / "model.gguf", "llama", model, tiny_model(), keys=keys)
    folder = resolve_model(str(file))
    model.save_pretrained(tmp_path / "converted")
    found, expected = weights_of(folder), weights_of(tmp_path / "converted")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    ours = reference.our_logits(open_checkpoint(folder), ids, torch.float32)
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "Q4_0"])
def test_experts_are_kept_in_blocks_and_are_what_gguf_dequantizes(
    tmp_path: Path, tiny_model: Callable[..., Path], kind: str
) -> None:
    model = random_model("gpt-oss")
    file = write_gguf(tmp_path / "model.gguf", "gpt-oss", model, tiny_model(), kind=kind)
    folder = resolve_model(str(file))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found, total = weights_of(folder), 0
    for leaf in ("gate", "up", "down"):
        whole = stored[f"blk.1.ffn_{leaf}_exps.weight"]
        expected = torch.from_numpy(gguf.dequantize(whole.data, whole.tensor_type))
        assert whole.tensor_type.name == kind
        for expert, weight in enumerate(expected):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}_proj.weight"
            assert torch.equal(found[name], weight)
    for name, weight in open_checkpoint(folder).weights():
        assert isinstance(weight, PackedWeight) == ("proj" in name or name == "lm_head"), name
        total += 1
    assert total > 3 * 6


def test_experts_of_another_count_are_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, keys = random_model("olmoe"), {"expert_count": 4}
    file = write_gguf(tmp_path / "model.gguf", "olmoe", model, tiny_model(), keys=keys)
    reason = r"blk\.0\.ffn_gate_exps\.weight holds 3 experts, but the metadata says 4"
    with pytest.raises(CheckpointError, match=reason):
        resolve_model(str(file))


def test_an_activation_without_its_numbers_is_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("apertus")
    monkeypatch.setattr(GGUFWriter, "add_xielu_beta", lambda self, numbers: None)
    file = write_gguf(tmp_path / "model.gguf", "apertus", model, tiny_model())
    with pytest.raises(CheckpointError, match=r"has no xielu\.beta of layer 0"):
        resolve_model(str(file))


def test_every_architecture_that_is_read_is_tried() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(
    tmp_path: Path, tiny_model: Callable[..., Path], architecture: str
) -> None:
    file = write_gguf(
        tmp_path / "model.gguf", architecture, random_model(architecture), tiny_model(), kind="Q8_0"
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    for name, tensor in weights_of(resolve_model(str(file))).items():
        # Embeddings are kept in bfloat16.
        expected = theirs[name].bfloat16().float() if "embed_tokens" in name else theirs[name]
        assert torch.equal(tensor, expected), name


@pytest.fixture
def llama(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a file; its options are those of :func:`write_gguf`."""

    def write(name: str = "model.gguf", **options: Any) -> Path:
        return write_gguf(tmp_path / name, "llama", random_model("llama"), tiny_model(), **options)

    return write


def test_layers_stay_packed_and_the_footprint_is_known(llama: Callable[..., Path]) -> None:
    folder = resolve_model(str(llama(kind="Q8_0")))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "gguf"
    weights, total = dict(checkpoint.weights()), 0
    for weight in weights.values():
        assert not isinstance(weight, DenseWeight)
        if isinstance(weight, PackedWeight):
            total += weight.nbytes - weight.levels.nbytes
        else:
            total += weight.numel() * 2
    perms = sum(  # of q, k and v together, where the estimate counts each
        weight.perm.nbytes * (3 if "qkv" in name else 2 if "gate_up" in name else 1)
        - weight.perm.nbytes
        for name, weight in weights.items()
        if isinstance(weight, PackedWeight) and weight.perm is not None
    )
    assert weight_bytes(folder, torch.bfloat16) == total + perms


def test_tokenizer_template_and_end_tokens_come_from_the_file(
    llama: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    original = AutoTokenizer.from_pretrained(tiny_model())
    folder = resolve_model(str(llama()))
    found = load_tokenizer(folder)
    for text in ("def add(a, b):\n    return a + b", "naïve 日本語 🙂 1234", "<|im_start|>user\nx"):
        ids = original.encode(text)
        assert found.encode(text) == ids
        assert found.decode(ids) == text
    assert found.chat_template == original.chat_template
    # The file names token 0; <|im_end|> ends an answer as well.
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [0, original.convert_tokens_to_ids("<|im_end|>")]


def test_what_is_rounded_is_said_in_a_line(
    llama: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dict(open_checkpoint(resolve_model(str(llama("exact.gguf", kind="Q8_0")))).weights())
    assert "rounded to float32" not in caplog.text
    dict(open_checkpoint(resolve_model(str(llama(kind="Q5_1")))).weights())
    assert "23 Q5_1 tensors keep their minima as zero points, rounded to float32" in caplog.text


def test_the_engine_says_what_transformers_says(llama: Callable[..., Path], reference: Any) -> None:
    checkpoint = open_checkpoint(resolve_model(str(llama(kind="Q5_1"))))
    model = reference.transformers_model(checkpoint)
    prompts, expected = map(list, zip(*reference.greedy(model, (5, 40), 32), strict=True))
    engine = reference.start(checkpoint)
    try:
        assert reference.together(engine, prompts, 32) == expected
    finally:
        engine.stop()


def test_a_file_is_converted_to_16_bits(llama: Callable[..., Path], tmp_path: Path) -> None:
    file = llama(kind="Q8_0")
    convert_gguf(file, tmp_path / "dense", tied=False)
    dense, packed = weights_of(tmp_path / "dense"), weights_of(resolve_model(str(file)))
    for name, tensor in packed.items():
        assert torch.equal(dense[name], tensor.bfloat16().float())


def test_a_file_without_blocks_is_a_16_bit_model(llama: Callable[..., Path]) -> None:
    folder = resolve_model(str(llama(kind="BF16")))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "none"
    prepared = prepare_checkpoint(
        str(folder), device=torch.device("cpu"), quantize="nf4", progress=False
    )
    weight = dict(prepared.weights())["model.layers.0.mlp.down_proj"]
    assert isinstance(weight, PackedWeight)


def llama3_table(factor: float) -> np.ndarray[Any, Any]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = {"rope_type": "default", "rope_theta": 5000.0}
    scaled = {
        **plain,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters=scaled)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    table: np.ndarray[Any, Any] = (
        (5000.0 ** -(torch.arange(0, 16, 2) / 16) / frequencies).float().numpy()
    )
    return table


def test_llama_3s_rotary_scaling_is_found_from_its_table(llama: Callable[..., Path]) -> None:
    table = llama3_table(32.0)
    folder = resolve_model(str(llama(extra={"rope_freqs.weight": table})))
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == pytest.approx(32)
    assert rope["original_max_position_embeddings"] == 8192
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight that is not Llama 3's"):
        resolve_model(str(llama("other.gguf", extra={"rope_freqs.weight": table**2})))


def test_a_folder_with_a_file_is_a_model(llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.move(llama(), folder / "tiny-Q8_0.gguf")
    (folder / "mmproj-tiny.gguf").write_bytes(b"the vision tower")
    (folder / "config.json").write_text("{}")  # such repositories may have one
    assert resolve_model(str(folder)) == resolve_model(str(folder / "tiny-Q8_0.gguf"))
    (folder / "tiny-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"one of tiny-Q4_0\.gguf, tiny-Q8_0\.gguf"):
        resolve_model(str(folder))


def test_a_split_file_is_read_from_all_its_parts(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = random_model("qwen2")
    whole = write_gguf(tmp_path / "whole.gguf", "qwen2", model, tiny_model())
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    tensors = list(stored_tensors("qwen2", model))
    moved = {name: tensor.numpy() for name, tensor in tensors if name.startswith("blk.2.")}
    model.state_dict = lambda: {  # type: ignore[assignment]
        name: tensor
        for name, tensor in type(model).state_dict(model).items()
        if "layers.2." not in name
    }
    write_gguf(first, "qwen2", model, tiny_model())
    writer = GGUFWriter(second, "qwen2")
    for name, values in moved.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = weights_of(resolve_model(str(first))), weights_of(resolve_model(str(whole)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"there is no m-00002-of-00002\.gguf"):
        resolve_model(str(first))


def test_a_file_that_has_changed_is_read_anew(llama: Callable[..., Path]) -> None:
    file = llama()
    before = weights_of(resolve_model(str(file)))
    after = weights_of(resolve_model(str(llama(kind="Q4_0"))))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])
    file.unlink()
    folder = resolve_model(str(file)) if file.exists() else None
    assert folder is None


def test_what_is_damaged_or_not_supported_is_refused_by_name(
    llama: Callable[..., Path], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    whole = llama()
    folder = resolve_model(str(whole))
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size - 5000)
    with pytest.raises(CheckpointError, match="is truncated"):
        list(open_checkpoint(folder).weights())
    for reason, options in {
        "setting rope.scaling.unheard_of = 1": {"keys": {"rope.scaling.unheard_of": 1}},
        "rotary scaling of type 'new'": {"keys": {"rope.scaling.type": "new"}},
        "a window of 24 tokens": {"keys": {"attention.sliding_window": 24}},
        "nothing here reads the tensor blk.0.new.weight": {
            "extra": {"blk.0.new.weight": np.zeros(3, np.float32)}
        },
    }.items():
        with pytest.raises(CheckpointError, match=reason):
            resolve_model(str(llama(**options)))
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="truncated or not GGUF"):
        resolve_model(str(tmp_path / "other.gguf"))
    writer = GGUFWriter(tmp_path / "new.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"architecture 'mamba'; supported are apertus, arcee, "
    ):
        resolve_model(str(tmp_path / "new.gguf"))


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0"])
def test_types_that_are_not_read_are_named(
    tmp_path: Path, llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    monkeypatch.setattr(
        gguf,
        "quantize",
        lambda values, _: np.zeros((len(values), values.shape[1] * 4 // block * nbytes), np.uint8),
    )
    monkeypatch.setitem(SIZES, "hidden_size", block)
    monkeypatch.setitem(SIZES, "intermediate_size", block)
    with pytest.raises(CheckpointError, match=f"is of type {kind}, which is not supported"):
        resolve_model(str(llama(kind=kind)))


def test_an_unknown_way_to_split_texts_is_refused(
    llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda self, _: None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre is None"):
        resolve_model(str(llama()))


def test_the_packed_form_is_kept_while_the_file_is_as_it_was(llama: Callable[..., Path]) -> None:
    file, device = llama(kind="Q8_0"), torch.device("cpu")
    first = prepare_checkpoint(str(file), device=device, progress=False).folder
    assert prepare_checkpoint(str(file), device=device, progress=False).folder == first
    assert [(entry.path, entry.stale) for entry in entries()] == [(first, None)]
    llama(kind="Q4_0")
    second = prepare_checkpoint(str(file), device=device, progress=False).folder
    assert [(entry.path, entry.stale) for entry in entries()] == [(second, None)]
    assert second != first
    file.unlink()
    assert [entry.stale for entry in entries()] == ["its model has gone"]
