"""What a ``quantization_config`` holds beside the settings that a format reads.

Tools add what they like to it, and another field with every version, so that a field which is not
known here is no error: a warning names it. An error is one whose name says that inputs or weights
are transformed, which nothing here computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.loaders.formats.settings import Settings

# GPTQModel's `rotation`, auto-round's `rotation_config`, `rotation_configs` and
# `spinquant_config`, compressed-tensors' `transform_config` in another format's settings.
_TRANSFORMED = ("rotat", "hadamard", "spinquant", "quarot", "transform")

# Of all formats together: what they read, and what changes nothing of what weights mean.
_KNOWN = {
    *("quant_method", "method", "format", "checkpoint_format", "version", "bits", "w_bit"),
    *("group_size", "q_group_size", "sym", "desc_act", "zero_point", "pack_dtype", "dynamic"),
    # Where modules are named: their tensors say what is quantized.
    *("modules_to_not_convert", "modules_to_convert", "modules_in_block_to_quantize"),
    *("lm_head", "ignore", "ignored_layers", "skip_modules", "llm_int8_skip_modules"),
    *("block_name_to_quantize", "to_quant_block_names", "quant_block_list"),
    *("module_name_preceding_first_block", "inside_layer_modules", "is_marlin_format"),
    # How it was quantized: AutoGPTQ, GPTQModel, transformers' GPTQConfig and AwqConfig
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "meta"),
    *("act_group_aware", "quantizer", "producer", "provider", "model_name_or_path"),
    *("model_file_base_name", "dataset", "tokenizer", "batch_size", "model_seqlen"),
    *("pad_token_id", "max_input_length", "cache_block_outputs", "parallel_packing", "v2"),
    # Which kernels compute it
    *("backend", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "do_fuse"),
    *("fuse_max_seq_len", "modules_to_fuse"),
    # auto-round
    *("packing_format", "extra_config", "regex_config", "data_type", "act_bits", "act_data_type"),
    *("act_group_size", "act_sym", "act_dynamic", "amp", "autoround_version", "enable_full_range"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "iters", "lr"),
    *("gradient_accumulate_steps", "low_gpu_mem_usage", "minmax_lr", "nsamples", "n_samples"),
    *("not_use_best_mse", "sampler", "scale_dtype", "seqlen", "super_bits", "super_group_size"),
    *("supported_types", "train_bs", "use_quant_input", "weight_config", "static_kv_dtype"),
    *("static_attention_dtype", "static_attention_granularity", "static_kv_granularity"),
    # bitsandbytes
    *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_threshold"),
    # compressed-tensors
    *("config_groups", "global_compression_ratio", "kv_cache_scheme", "quantization_status"),
    *("sparsity_config", "moe_sparsity_config", "transform_config", "run_compressed", "dequantize"),
    # FP8, HQQ, MXFP4, GGUF
    *("activation_scheme", "weight_block_size", "scale_fmt", "fmt", "expert_dtype"),
    *("kv_cache_quant_method", "quant_config", "dynamic_config", "gguf_file"),
}


# Where a module's own settings stand, by its name or a pattern of names: GPTQModel, auto-round.
_OF_MODULES = ("dynamic", "extra_config")


def refuse_transforms(settings: Settings, read: frozenset[str]) -> None:
    """Raises CheckpointError for a setting by which weights or inputs are transformed.

    read: fields of such a name that the format looks into itself.
    """
    for part in [settings, *_of_modules(settings, settings.source)]:
        for name, value in part.items():
            if value and name not in read and any(word in name.lower() for word in _TRANSFORMED):
                raise part.refuse(name, "none: rotations and transforms are not supported")


def unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    """The names of fields that are set and that nothing here knows, also of single modules."""
    parts = [settings, *_of_modules(settings)]
    return sorted(
        {name for part in parts for name, value in part.items() if value and name not in _KNOWN}
    )


def _of_modules(settings: Mapping[str, Any], source: str = "") -> Iterator[Settings]:
    """What is set for some modules; what is no object, the format refuses as it reads it."""
    for table in _OF_MODULES:
        if isinstance(found := settings.get(table), Mapping):
            for name, own in found.items():
                if isinstance(own, Mapping):
                    yield Settings(own, f"{source}: {table} {name!r}")
