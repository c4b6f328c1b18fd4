"""Fields of other servers' APIs, which their clients and routers add to every request.

They come from vLLM's and SGLang's request classes and from llama.cpp's server. A field is ignored
if it cannot change the generated text here. Otherwise it is refused, unless its value turns the
feature off.
"""

from __future__ import annotations

from typing import Any

_NO_MEDIA = "the models here read text only"
_NO_REASONING = "only chats tell reasoning from the rest of the text"
_OTHER_SAMPLER = "belongs to a sampler that is refused"
_BEAM_SEARCH = "belongs to beam search, which is refused"
_ONE_REPLICA = "there is only one replica"
_HINT = "only a hint to speed up generation"
_NAMED_BY_HEADER = "X-Request-Id names a request"
_NO_EXPERTS = "the routing of experts is not returned"

IGNORED = {
    "cache_prompt": "prefixes are kept while there is room",
    "custom_labels": "the labels of the metrics are fixed",
    "data_parallel_rank": _ONE_REPLICA,
    "disagg_prefill_dp_rank": _ONE_REPLICA,
    "dry_allowed_length": _OTHER_SAMPLER,
    "dry_base": _OTHER_SAMPLER,
    "dry_penalty_last_n": _OTHER_SAMPLER,
    "dry_sequence_breakers": _OTHER_SAMPLER,
    "dynatemp_exponent": _OTHER_SAMPLER,
    "early_stopping": _BEAM_SEARCH,
    "guided_decoding_backend": "there is only one backend",
    "id_slot": _HINT,
    "images_config": _NO_MEDIA,
    "length_penalty": _BEAM_SEARCH,
    "max_dynamic_patch": _NO_MEDIA,
    "media_io_kwargs": _NO_MEDIA,
    "min_dynamic_patch": _NO_MEDIA,
    "mirostat_eta": _OTHER_SAMPLER,
    "mirostat_tau": _OTHER_SAMPLER,
    "mm_processor_kwargs": _NO_MEDIA,
    "ngram_corpus_id": _HINT,
    "repeat_last_n": _OTHER_SAMPLER,
    "request_id": _NAMED_BY_HEADER,
    "return_mm_kwargs": _NO_MEDIA,
    "return_progress": "prompts are read without a word of how far",
    "rid": _NAMED_BY_HEADER,
    "routed_dp_rank": _ONE_REPLICA,
    "routed_experts_prompt_start": _NO_EXPERTS,
    "routed_experts_start_len": _NO_EXPERTS,
    "session_id": _HINT,
    "stream_interval": "every token is sent as soon as it is generated",
    "timings_per_token": "timings are in the metrics",
    "use_audio_in_video": _NO_MEDIA,
    "xtc_threshold": _OTHER_SAMPLER,
}

# Ignored where there is no chat.
IGNORED_REASONING = dict.fromkeys(
    ("include_reasoning", "reasoning_format", "separate_reasoning", "stream_reasoning"),
    _NO_REASONING,
)

_NO_PLUGINS = "custom samplers are not supported"
_ONE_SERVER = "prompts are not computed on another server"

REFUSED = {
    "bootstrap_host": _ONE_SERVER,
    "bootstrap_port": _ONE_SERVER,
    "bootstrap_room": _ONE_SERVER,
    "custom_logit_processor": _NO_PLUGINS,
    "custom_params": _NO_PLUGINS,
    "dry_multiplier": "DRY is not supported: use repetition_penalty or frequency_penalty",
    "dynatemp_range": "dynamic temperature is not supported: use temperature and min_p",
    "ec_transfer_params": _ONE_SERVER,
    "enable_thinking": "enable_thinking is not supported here: put it into chat_template_kwargs",
    "extra_key": "extra_key is not supported: use cache_salt",
    "guided_whitespace_pattern": "guided_whitespace_pattern is not supported: use guided_regex",
    "input_ids": "input_ids is not supported: send token ids to /v1/completions",
    "kv_transfer_params": _ONE_SERVER,
    "logits_processors": _NO_PLUGINS,
    "lora": "lora is not supported: use adapter, or an adapter's name as the model",
    "lora_path": "lora_path is not supported: use adapter, or an adapter's name as the model",
    "mirostat": "Mirostat is not supported: use min_p",
    "n_predict": "n_predict is not supported: use max_tokens",
    "n_probs": "n_probs is not supported: use logprobs",
    "no_stop_trim": "no_stop_trim is not supported: use include_stop_str_in_output",
    "prompt_embeds": "prompts are text or token ids",
    "repeat_penalty": "repeat_penalty is not supported: use repetition_penalty",
    "repetition_detection": "repetition_detection is not supported: use repetition_penalty",
    "return_cached_tokens_details": "only the number of cached_tokens is known: see usage",
    "return_hidden_states": "hidden states are not returned: /v1/embeddings has the last one",
    "return_meta_info": "return_meta_info is not supported: see usage and logprobs",
    "return_prompt_text": "return_prompt_text is not supported: use return_token_ids",
    "return_prompt_token_ids": "return_prompt_token_ids is not supported: use return_token_ids",
    "return_routed_experts": _NO_EXPERTS,
    "return_token_offsets": "return_token_offsets is not supported: completions' logprobs have "
    "text_offset",
    "samplers": "the order of samplers is fixed",
    "session_params": "sessions are not stored: send the conversation",
    "stop_regex": "stop_regex is not supported: use stop or guided_regex",
    "t_max_predict_ms": "t_max_predict_ms is not supported: use timeout",
    "task": "task is not supported: put it into the messages",
    "tfs_z": "tail-free sampling is not supported: use min_p",
    "top_n_sigma": "top_n_sigma is not supported: use min_p",
    "typical_p": "typical_p is not supported: use top_p or min_p",
    "use_beam_search": "beam search is not supported",
    "vllm_xargs": _NO_PLUGINS,
    "watermarking": "watermarks are not supported",
    "xtc_probability": "XTC is not supported: use min_p",
}

# Values that turn a refused feature off, besides null, false, 0, "", [] and {}.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n_predict": (-1,),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
}

_OF_CHATS = "{} belongs to /v1/chat/completions"

# Fields of chat completions which are refused in completions, and the reverse.
REFUSED_IN_COMPLETIONS = {
    "max_completion_tokens": "max_completion_tokens is not supported here: use max_tokens"
} | {
    name: _OF_CHATS.format(name)
    for name in (
        "audio",
        "chat_template_kwargs",
        "function_call",
        "functions",
        "modalities",
        "parallel_tool_calls",
        "reasoning_effort",
        "thinking_token_budget",
        "tool_choice",
        "tools",
        "top_logprobs",
        "verbosity",
    )
}
NEUTRAL_IN_COMPLETIONS = NEUTRAL | {
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none",),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
}
REFUSED_IN_CHATS = {
    "best_of": "best_of is not supported here: use n",
    "suffix": "suffix is not supported: put the text into the messages",
}
NEUTRAL_IN_CHATS = NEUTRAL | {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
}
