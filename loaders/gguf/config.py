"""A transformers config from the metadata of a GGUF file.

Every setting that the file states is written, because the defaults of a config class are those of
one checkpoint. What the file leaves to llama.cpp (windows of Gemma, layers without positions) is
written as llama.cpp has it. A key that is not known here is refused: it may change the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.loaders.errors import CheckpointError

ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
# What Llama 3.1 to 3.3 have beside the factor; GGUF files hold only the resulting table.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Keys that say nothing the tensors' shapes do not, and those of other uses of a file.
_REDUNDANT = (
    *("vocab_size", "attention.value_length", "embedding_length_out", "pooling_type"),
    *("rope.scaling.finetuned", "tensor_data_layout", "attention.causal"),
)


class Metadata:
    """The keys of one file's architecture, of which each must be asked for."""

    def __init__(self, source: str, values: Mapping[str, Any], tensors: Collection[str]) -> None:
        """values: without the architecture's prefix.

        tensors: the names of all tensors.
        """
        self._source = source
        self.tensors = tensors
        self._values = {name: _shortest(value) for name, value in values.items()}
        self._asked = set(_REDUNDANT)

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return self._values.get(name, default)

    def need(self, name: str) -> Any:
        """Raises CheckpointError if the file does not have the key."""
        value = self.get(name)
        if value is None:
            raise self.error(f"has no {name}")
        return value

    def finish(self) -> None:
        """Raises CheckpointError for a key that was not asked for."""
        unknown = sorted(self._values.keys() - self._asked)
        if unknown:
            raise self.error(
                f"has the setting {unknown[0]} = {self._values[unknown[0]]!r}, which is not "
                "supported"
            )

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._source} {reason}")


def _shortest(value: Any) -> Any:
    """Of a number in float32, the decimal that it was written for: 1e-05, not 9.99999974e-06."""
    if isinstance(value, float) and np.float32(value) == value:
        return float(str(np.float32(value)))
    return value


@dataclass(frozen=True)
class Family:
    """What an architecture of GGUF files is in transformers.

    model_type: transformers' name.
    settings: adds what the family has beside the common settings.
    permuted: whether llama.cpp permutes the rows of queries and keys.
    norm_offset: what llama.cpp adds to the weights of norms.
    eps: the name of the norms' epsilon in the config.
    """

    model_type: str
    settings: Callable[[Metadata, dict[str, Any]], None] = lambda metadata, config: None
    permuted: bool = False
    norm_offset: float = 0.0
    eps: str = "rms_norm_eps"


def _activation(name: str, field: str = "hidden_act") -> Callable[[Metadata, dict[str, Any]], None]:
    def add(metadata: Metadata, config: dict[str, Any]) -> None:
        config[field] = name

    return add


def _gemma(metadata: Metadata, config: dict[str, Any], large_layers: int, pattern: int) -> None:
    config["hidden_activation"] = "gelu_pytorch_tanh"
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # Only the largest model of the family scales by something else than the head's size.
    by_hidden = layers == large_layers
    scalar = config["hidden_size"] // heads if by_hidden else config["head_dim"]
    config["query_pre_attn_scalar"] = scalar
    metadata.need("attention.sliding_window")
    _windows(metadata, config, pattern)


def _windows(metadata: Metadata, config: dict[str, Any], period: int) -> None:
    """The windows of a model that may have some.

    period: a layer sees everything after one less than as many with a window, unless the file says
        which layers have one, or another period.
    """
    layers, window = config["num_hidden_layers"], metadata.get("attention.sliding_window")
    pattern = metadata.get("attention.sliding_window_pattern", period)
    config["sliding_window"] = window or None
    if not window:
        pattern = [False] * layers
    elif isinstance(pattern, int):
        pattern = [index % pattern != pattern - 1 for index in range(layers)]
    if len(pattern) != layers:
        raise metadata.error(f"has a sliding_window_pattern of {len(pattern)} for {layers} layers")
    config["layer_types"] = [
        "sliding_attention" if has_one else "full_attention" for has_one in pattern
    ]


def _gemma2(metadata: Metadata, config: dict[str, Any]) -> None:
    _gemma(metadata, config, large_layers=46, pattern=2)
    for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        config[name] = metadata.get(name, default)


def _gemma3(metadata: Metadata, config: dict[str, Any]) -> None:
    _gemma(metadata, config, large_layers=62, pattern=6)
    config["final_logit_softcapping"] = metadata.get("final_logit_softcapping")
    local = metadata.get("rope.freq_base_swa", 10000.0)
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _phi3(metadata: Metadata, config: dict[str, Any]) -> None:
    config["sliding_window"] = metadata.get("attention.sliding_window") or None
    config["hidden_act"] = "silu"
    config.setdefault("pad_token_id", None)
    config["original_max_position_embeddings"] = config["rope_parameters"].get(
        "original_max_position_embeddings", config["max_position_embeddings"]
    )


def _starcoder2(metadata: Metadata, config: dict[str, Any]) -> None:
    config["hidden_act"] = "gelu_pytorch_tanh"
    config["use_bias"] = config["attention_bias"]
    config["sliding_window"] = metadata.get("attention.sliding_window")


def _granite(metadata: Metadata, config: dict[str, Any]) -> None:
    for name, key in (
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ):
        config[name] = metadata.need(key)


def _smollm3(metadata: Metadata, config: dict[str, Any]) -> None:
    layers = config["num_hidden_layers"]
    config["no_rope_layers"] = [int((index + 1) % 4 != 0) for index in range(layers)]


def _cohere(metadata: Metadata, config: dict[str, Any]) -> None:
    config["logit_scale"] = metadata.need("logit_scale")
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in metadata.tensors


def _seed_oss(metadata: Metadata, config: dict[str, Any]) -> None:
    config["attention_out_bias"] = "blk.0.attn_output.bias" in metadata.tensors


def _cohere2(metadata: Metadata, config: dict[str, Any]) -> None:
    config["logit_scale"] = metadata.need("logit_scale")
    _windows(metadata, config, period=4)


def _exaone4(metadata: Metadata, config: dict[str, Any]) -> None:
    _windows(metadata, config, period=4)


def _ernie(metadata: Metadata, config: dict[str, Any]) -> None:
    config["use_bias"] = config["mlp_bias"]


def _olmo(metadata: Metadata, config: dict[str, Any]) -> None:
    """OLMo 3 is OLMo 2 with windows, whose layers do not scale their frequencies."""
    if not metadata.get("attention.sliding_window"):
        return
    config["model_type"] = "olmo3"
    _windows(metadata, config, period=4)
    rope = config["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}


def _mistral3(metadata: Metadata, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        raise metadata.error("has no rotary scaling of type 'yarn'")
    names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    rope |= {name: metadata.need(f"rope.scaling.{key}") for name, key in names.items()}
    # llama.cpp and transformers agree on other values only if both scales are this one.
    if metadata.get("rope.scaling.yarn_log_multiplier", 1.0) != 1.0:
        raise metadata.error("has a rope.scaling.yarn_log_multiplier other than 1")
    rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    rope["llama_4_scaling_beta"] = metadata.need("attention.temperature_scale")


def _llama(metadata: Metadata, config: dict[str, Any]) -> None:
    """Mixtral is Llama with experts."""
    if metadata.get("expert_count"):
        config["model_type"] = "mixtral"
        config["sliding_window"] = None
        _experts(metadata, config, "num_local_experts")


def _experts(metadata: Metadata, config: dict[str, Any], count: str) -> None:
    config[count] = metadata.need("expert_count")
    config["num_experts_per_tok"] = metadata.need("expert_used_count")


def _qwen_moe(metadata: Metadata, config: dict[str, Any]) -> None:
    """llama.cpp renormalizes the scores of Qwen3's experts, and not those of Qwen2's."""
    _experts(metadata, config, "num_experts")
    config["norm_topk_prob"] = config["model_type"] == "qwen3_moe"
    width = config["intermediate_size"] // config["num_experts_per_tok"]
    config["moe_intermediate_size"] = metadata.get("expert_feed_forward_length", width)
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2_moe(metadata: Metadata, config: dict[str, Any]) -> None:
    _qwen_moe(metadata, config)
    shared = metadata.get("expert_shared_feed_forward_length", config["intermediate_size"])
    config["shared_expert_intermediate_size"] = shared


def _olmoe(metadata: Metadata, config: dict[str, Any]) -> None:
    _experts(metadata, config, "num_experts")
    config["norm_topk_prob"] = False


def _gpt_oss(metadata: Metadata, config: dict[str, Any]) -> None:
    """The constants of its gate, and that the borders of YaRN's ramp are not rounded, are not in
    the file: they are the published models'."""
    _experts(metadata, config, "num_local_experts")
    config["intermediate_size"] = metadata.need("expert_feed_forward_length")
    config |= {"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    metadata.need("attention.sliding_window")
    _windows(metadata, config, period=2)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            rope[name] = metadata.get(f"rope.scaling.yarn_{name}", default)
        rope["truncate"] = False


FAMILIES = {
    "llama": Family("llama", _llama, permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", _activation("gelu_pytorch_tanh"), norm_offset=1.0),
    "gemma2": Family("gemma2", _gemma2, norm_offset=1.0),
    "gemma3": Family("gemma3_text", _gemma3, norm_offset=1.0),
    "phi3": Family("phi3", _phi3),
    "starcoder2": Family("starcoder2", _starcoder2, eps="norm_epsilon"),
    "nemotron": Family("nemotron", _activation("relu2"), norm_offset=1.0, eps="norm_eps"),
    "granite": Family("granite", _granite, permuted=True),
    "smollm3": Family("smollm3", _smollm3, permuted=True),
    "arcee": Family("arcee", _activation("relu2"), permuted=True),
    "olmo2": Family("olmo2", _olmo),
    "olmoe": Family("olmoe", _olmoe),
    "qwen2moe": Family("qwen2_moe", _qwen2_moe),
    "qwen3moe": Family("qwen3_moe", _qwen_moe),
    "gpt-oss": Family("gpt_oss", _gpt_oss),
    "apertus": Family("apertus", _activation("xielu")),
    "mistral3": Family("ministral3", _mistral3, permuted=True),
    "exaone4": Family("exaone4", _exaone4),
    "chatglm": Family("glm"),
    "glm4": Family("glm4"),
    "ernie4_5": Family("ernie4_5", _ernie),
    "hunyuan-dense": Family("hunyuan_v1_dense"),
    "seed_oss": Family("seed_oss", _seed_oss),
    "command-r": Family("cohere", _cohere, eps="layer_norm_eps"),
    "cohere2": Family("cohere2", _cohere2, eps="layer_norm_eps"),
}


def config_of(
    architecture: str,
    metadata: Metadata,
    vocab: int,
    rope_tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The contents of config.json.

    vocab: rows of the embeddings.
    rope_tensors: those of ROPE_FREQS and ROPE_FACTORS that the file has.
    Raises CheckpointError naming the architecture or the setting that is not supported.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        raise metadata.error(
            f"has the architecture {architecture!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    heads = metadata.need("attention.head_count")
    hidden = metadata.need("embedding_length")
    kv_heads = metadata.get("attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise metadata.error("has numbers of heads by layer, which is not supported")
    tensors, head_dim = metadata.tensors, metadata.get("attention.key_length", hidden // heads)
    eps_keys = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    eps = [metadata.get(key) for key in eps_keys]
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": _width(metadata),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": metadata.need("context_length"),
        family.eps: next(value for value in (*eps, 1e-5) if value is not None),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "dtype": "bfloat16",
    }
    config["rope_parameters"] = _rope(metadata, config, rope_tensors)
    family.settings(metadata, config)
    if "sliding_window" not in config:
        window = metadata.get("attention.sliding_window")
        if window and window < config["max_position_embeddings"]:
            raise metadata.error(f"has a window of {window} tokens, which is not supported")
    metadata.finish()
    return config


def _width(metadata: Metadata) -> int:
    """Of the MLPs; a file whose layers are all mixtures may state that of the experts alone."""
    width = metadata.get("feed_forward_length") or metadata.get("expert_feed_forward_length")
    if not isinstance(width, int):
        raise metadata.error("has no feed_forward_length that is a number")
    return width


def _rope(
    metadata: Metadata, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """``rope_parameters`` of a model, or of its layers that see everything."""
    rotated = metadata.get("rope.dimension_count", config["head_dim"])
    kind = metadata.get("rope.scaling.type", "none") or "none"
    factor = metadata.get("rope.scaling.factor", 0) or metadata.get("rope.scale_linear", 0)
    attention = metadata.get("rope.scaling.attn_factor")
    original = metadata.get("rope.scaling.original_context_length")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
    }
    if rotated != config["head_dim"]:
        rope["partial_rotary_factor"] = rotated / config["head_dim"]
    if ROPE_FREQS in tensors:
        return _llama3(metadata, rope, tensors[ROPE_FREQS].float())
    if any(name in tensors for name in ROPE_FACTORS):
        short, long = (tensors.get(name) for name in ROPE_FACTORS)
        if short is None or long is None or original is None:
            raise metadata.error("has one of the tables of longrope without the other")
        about = {"attention_factor": attention} if attention is not None else {}
        return {
            **rope,
            **about,
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "factor": config["max_position_embeddings"] / original,
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
        }
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        if attention is not None:
            rope["attention_factor"] = attention
        rope["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        return {**rope, "rope_type": "yarn", "factor": factor}
    raise metadata.error(f"has rotary scaling of type {kind!r}, which is not supported")


def _llama3(metadata: Metadata, rope: dict[str, Any], table: Tensor) -> dict[str, Any]:
    """The settings that give the table of divisors of frequencies."""
    if bool((table == 1).all()):
        return rope
    factor = float(table.max())
    exponents = torch.arange(len(table), dtype=torch.float64) / len(table)
    frequencies = float(rope["rope_theta"]) ** -exponents
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(table.double(), expected, rtol=1e-4):
        raise metadata.error(f"has a table {ROPE_FREQS} that is not Llama 3's")
    return {**rope, **_LLAMA3, "rope_type": "llama3", "factor": factor}
