"""GGUF files for tests, as llama.cpp's converter names and permutes tensors, by gguf's writer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nybble.kernels import PackedWeight
from nybble.loaders import open_checkpoint
from nybble.loaders.formats.gguf_blocks import BLOCK_TYPES
from nybble.loaders.gguf.config import FAMILIES
from nybble.models import architecture_of

# Bytes of a block at which its float16 scales and minima are.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()},
}


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
