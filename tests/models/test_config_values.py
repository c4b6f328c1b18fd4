"""Values in config.json with which nothing can be computed are refused by the setting's name."""

from __future__ import annotations

import math

import pytest
from transformers import AutoConfig

from nybble.models import UnsupportedModelError, architecture_of

SIZES: dict[str, object] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {**LINEAR, "rope_type": "yarn"}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


def refused(family: str, match: str, **settings: object) -> None:
    config = AutoConfig.for_model(family, **SIZES)
    for name, value in settings.items():  # as given: config classes mend some values
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match=match):
        architecture_of(config)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "rms_norm_eps", math.inf),
        ("llama", "rms_norm_eps", math.nan),
        ("lfm2", "norm_eps", 1e9),
        ("lfm2", "block_ffn_dim_multiplier", math.inf),
        ("gemma3_text", "query_pre_attn_scalar", 0),
        ("falcon_h1", "key_multiplier", None),
        ("granitemoehybrid", "num_local_experts", None),
        ("deepseek_v3", "num_nextn_predict_layers", 1e9),
        ("olmo2", "num_hidden_layers", 10**12),
        ("mistral", "sliding_window", 0),
        ("mixtral", "sliding_window", -1),
        ("phi3", "sliding_window", 0),
        ("gpt_oss", "sliding_window", 0),
        ("gpt_oss", "sliding_window", None),
        ("granitemoehybrid", "num_local_experts", -1),
        ("ernie4_5_moe", "moe_num_shared_experts", -1),
        ("ernie4_5_moe", "moe_layer_start_index", -2),
        ("ernie4_5_moe", "moe_norm_min", -1.0),
        ("phimoe", "router_jitter_noise", -1.0),
        ("gemma3_text", "head_dim", 0),
        ("glm4_moe", "first_k_dense_replace", -1),
        ("deepseek_v3", "first_k_dense_replace", -1),
        ("glm4_moe", "routed_scaling_factor", 0.0),
        ("gemma2", "attn_logit_softcapping", 0.0),
        ("gemma2", "final_logit_softcapping", -30.0),
        ("gpt_oss", "swiglu_limit", 0.0),
        ("granite", "logits_scaling", 0),
        ("granite", "attention_multiplier", 0),
        ("cohere", "logit_scale", 0.0),
        ("falcon_h1", "lm_head_multiplier", -1.0),
        ("lfm2", "block_ffn_dim_multiplier", 0),
    ],
)
def test_a_number_that_is_none_is_named(family: str, name: str, value: object) -> None:
    refused(family, name, **{name: value})


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("granitemoehybrid", "position_embedding_type", "alibi"),
        ("granite", "position_embedding_type", "nope"),
        ("llama", "position_embedding_type", "alibi"),
        ("starcoder2", "norm_type", "rms_norm"),
        ("starcoder2", "mlp_type", "gated"),
        ("glm4_moe", "scoring_func", "softmax"),
        ("glm4_moe_lite", "topk_method", "greedy"),
        ("deepseek_v3", "scoring_func", "softmax"),
    ],
)
def test_a_word_that_chooses_another_computation_is_named(
    family: str, name: str, value: object
) -> None:
    refused(family, f"{name} is {value!r}", **{name: value})


@pytest.mark.parametrize("value", ["nope", None])
def test_granite_4_may_have_no_positions(value: str | None) -> None:
    config = AutoConfig.for_model(
        "granitemoehybrid", **SIZES | {"layer_types": ["full_attention"] * 2}
    )
    config.num_hidden_layers, config.position_embedding_type = 2, value
    assert {attention.rope for attention in architecture_of(config).attentions} == {None}


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({**LLAMA3, "rope_theta": None}, "rope_theta"),
        ({**LLAMA3, "rope_theta": math.inf}, "rope_theta"),
        ({**LLAMA3, "rope_theta": 0}, "rope_theta"),
        ({**LLAMA3, "high_freq_factor": 0}, "high_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor"),
        ({**LLAMA3, "factor": [1]}, "factor"),
        ({**LLAMA3, "low_freq_factor": True}, "low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**LINEAR, "factor": -1}, "factor"),
        ({**LINEAR, "factor": math.nan}, "factor"),
        ({**LINEAR, "factor": "x"}, "factor"),
        ({**LINEAR, "rope_type": "dynamic", "factor": None}, "factor"),
        ({**YARN, "original_max_position_embeddings": -1}, "original_max_position_embeddings"),
        ({**YARN, "beta_slow": math.inf}, "beta_slow"),
        ({**YARN, "attention_factor": 0}, "attention_factor"),
        ({**LONGROPE, "short_factor": []}, "short_factor"),
        ({**LONGROPE, "long_factor": "x"}, "long_factor"),
        ({**LONGROPE, "long_factor": [0.0] * 8}, "long_factor"),
        ({**LONGROPE, "factor": 0.5}, "factor"),
    ],
)
def test_a_number_of_rope_is_named(parameters: dict[str, object], name: str) -> None:
    refused("llama", f"{name}.*rope_parameters|rope_parameters.*{name}", rope_parameters=parameters)


def test_more_experts_a_token_than_there_are_is_refused_in_every_family() -> None:
    for family in ("gpt_oss", "mixtral"):
        refused(
            family, "a token uses 8 experts, but there are 4",
            num_local_experts=4, num_experts_per_tok=8,
        )  # fmt: skip
