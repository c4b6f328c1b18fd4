"""A small random model of every family: a family is a row, with what its config has beside the
sizes that all rows share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from transformers import AutoConfig

from nybble.models import architecture_of

# Windows of 24 tokens and steps of 32 lie within the prompts.
WINDOW, PROMPTS = 24, (5, 40, 70)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Of mixtures: 3 of 8 experts.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GLM_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
STATE_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
NEMOTRON_SPACE = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 16,
    # Below it transformers clamps what prompts decay by, and not what answers do.
    "time_step_min": 1e-30,
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": WINDOW}),
    "ministral": ("ministral", MIXED),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, **MIXED}),
    "qwen3": ("qwen3", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
    ),
    "granite 4": (
        "granitemoehybrid",
        {
            "head_dim": 16,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "layer_types": ["attention"] * 3,
            "position_embedding_type": "rope",
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
    ),
    "granite 4 hybrid": (
        "granitemoehybrid",
        {
            **STATE_SPACE,
            "head_dim": 16,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "residual_multiplier": 0.7,
        },
    ),
    "granite 4 hybrid mixture": (
        "granitemoehybrid",
        {
            **STATE_SPACE,
            "head_dim": 16,
            "mamba_n_groups": 1,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "shared_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "residual_multiplier": 0.7,
        },
    ),
    "bamba": ("bamba", {**STATE_SPACE, "head_dim": 16, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "falcon_h1",
        {
            **STATE_SPACE,
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "embedding_multiplier": 1.5,
            "lm_head_multiplier": 0.5,
            "mlp_multipliers": [0.7, 1.3],
            "key_multiplier": 0.8,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.6,
        },
    ),
    "falcon_h1 with norms": (
        "falcon_h1",
        {
            **STATE_SPACE,
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "projectors_bias": True,
            "mlp_bias": True,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **NEMOTRON_SPACE,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        },
    ),
    "nemotron_h with mixtures": (
        "nemotron_h",
        {
            **NEMOTRON_SPACE,
            **GLM_EXPERTS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "moe_shared_expert_intermediate_size": 64,
            "routed_scaling_factor": 1.5,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "seed_oss": ("seed_oss", {}),
    "exaone4": ("exaone4", {}),
    "exaone4 with windows": ("exaone4", MIXED),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            **MIXED,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **MIXED,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
            },
        },
    ),
    "phi3": ("phi3", {"head_dim": 16, "sliding_window": WINDOW}),
    "phi3 with longrope": (
        "phi3",
        {
            "head_dim": 16,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [4.0, 4.5, 5.0, 5.5, 6.0, 6.5],
            },
        },
    ),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {"attention_bias": True}),
    "cohere": ("cohere", {"head_dim": 16, "logit_scale": 0.5}),
    "cohere with norms of heads": ("cohere", {"head_dim": 16, "use_qk_norm": True}),
    "cohere2": ("cohere2", MIXED),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5 with biases": ("ernie4_5", {"use_bias": True}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "alpha": 5.0,
            }
        },
    ),
    "arcee": ("arcee", {"hidden_act": "relu2"}),
    "nemotron": ("nemotron", {"hidden_act": "relu2"}),
    "apertus": ("apertus", {}),
    "apertus with biases": ("apertus", {"attention_bias": True, "hidden_act": "relu2"}),
    "starcoder2": ("starcoder2", {"head_dim": 16, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral with a window": ("mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2_moe": ("qwen2_moe", {"head_dim": 16, **EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen2_moe with dense layers": (
        "qwen2_moe",
        {
            "head_dim": 16,
            **EXPERTS,
            "shared_expert_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe with dense layers": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    "olmoe": ("olmoe", {"head_dim": 16, **EXPERTS, "intermediate_size": 32}),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {**GLM_EXPERTS, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5},
    ),
    "glm4_moe with groups": (
        "glm4_moe",
        {**GLM_EXPERTS, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **MIXED,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "lfm2": ("lfm2", {"head_dim": 16, "layer_types": ["conv", "full_attention", "conv"]}),
    "lfm2 with biases": (
        "lfm2",
        {
            "head_dim": 16,
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [2],
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 64, "mlp_only_layers": [2]},
    ),
    "qwen3_5": ("qwen3_5_text", DELTA_NET),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **LATENT,
            **GLM_EXPERTS,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v2 with groups": (
        "deepseek_v2",
        {
            **LATENT,
            **GLM_EXPERTS,
            "q_lora_rank": 32,
            "attention_bias": True,
            "mlp_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **LATENT,
            **GLM_EXPERTS,
            "q_lora_rank": 32,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3 without queries' latents": (
        "deepseek_v3",
        {
            **LATENT,
            **GLM_EXPERTS,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {**LATENT, **GLM_EXPERTS, "q_lora_rank": 32, "rms_norm_eps": 1e-3},
    ),
    "youtu": ("youtu", {**LATENT, "q_lora_rank": 32, "tie_word_embeddings": True}),
    "phimoe": (
        "phimoe",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "router_jitter_noise": 0.3,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "phimoe with longrope": (
        "phimoe",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
            },
        },
    ),
}
rows = pytest.mark.parametrize("row", ROWS)
# In `make test`, a model of each kind of layers; `make test-all` has the other rows.
_SHOWN = {
    "llama with biases",
    "gemma3",
    "granite 4 hybrid mixture",
    "deepseek_v3",
    "lfm2",
    "qwen3_next",
}
# Of these, what also generates long answers there, and what is trained.
_GENERATING = {"granite 4 hybrid mixture", "deepseek_v3"}
_TRAINED = {"granite 4 hybrid mixture"}
# Variants of which the logits are compared there: of what no other row computes.
_VARIANTS = {
    "llama with biases",
    "phi3 with longrope",
    "cohere with norms of heads",
    "glm4_moe with groups",
}


def only(shown: set[str], rows: Iterable[str] = ROWS) -> pytest.MarkDecorator:
    """Of ``rows`` those in `make test`; the others are in `make test-all`."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "row", [row if row in shown else pytest.param(row, marks=slow) for row in rows]
    )


def has_experts(row: str) -> bool:
    family, settings = ROWS[row]
    return architecture_of(AutoConfig.for_model(family, **SIZES | settings)).has_experts


shown_rows, generating_rows, trained_rows = only(_SHOWN), only(_GENERATING), only(_TRAINED)
packed_rows = only({*_SHOWN, "gpt_oss", "granite", "gemma2", "cohere", "falcon_h1"})
qat_rows = only({"qwen2_moe", "qwen3_next", "granite 4 hybrid mixture"})
mixture_rows = only(_GENERATING, [row for row in ROWS if has_experts(row)])
# A family once, and its other variants in `make test-all`.
quick_rows = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.slow)
        if " with" in row and row not in _VARIANTS
        else row
        for row in ROWS
    ],
)
