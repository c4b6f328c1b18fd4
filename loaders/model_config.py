"""A folder's config.json: of a model of texts, or of the texts' part of a multimodal one.

InternLM 3 has a config of its own for what is Llama otherwise; it is read as Llama's.

The language model of the wrappers here computes texts as a model of its own would. Its tensors have
``language_model.`` in their names, and those of the other parts are not read
(:mod:`nybble.loaders.shards`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.settings import read_object
from nybble.models import UnsupportedModelError, require_family

_WRAPPERS = frozenset(("gemma3", "llava", "mistral3", "qwen3_5", "qwen3_5_moe"))
_INTERNLM3 = "internlm3"
# What transformers' own checks put before a reason.
_VALIDATOR = re.compile(r"^Class validation error for validator '\w+':\s+\w+: ")
# Settings of the whole model that its language model needs.
_SHARED = ("quantization_config", "dtype", "torch_dtype", "eos_token_id", "bos_token_id")


def load_config(folder: Path) -> PretrainedConfig:
    """Raises CheckpointError for a file that cannot be read, UnsupportedModelError for a family."""
    path = folder / "config.json"
    written = read_object(path)
    wrapper = _is_wrapper(written)
    renamed = _as_llama(written) if _family(written) == _INTERNLM3 else None
    if renamed is None:
        own = written["text_config"].get("model_type", "") if wrapper else _family(written)
        require_family(own, _WRAPPERS)
    if written.get("is_causal") is False:
        raise UnsupportedModelError(
            f"{path} says is_causal: false, but attention to later tokens is not supported"
        )
    architectures = written.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(n, str) for n in architectures):
        raise CheckpointError(f"{path}: architectures is {architectures!r}, expected names")
    try:
        config: PretrainedConfig = (
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if renamed is None
            else LlamaConfig.from_dict(renamed)
        )
    except Exception as error:  # each model's config class raises errors of its own
        about = written["text_config"] if wrapper else written
        raise CheckpointError(f"{path} cannot be read: {_reason(error, about)}") from error
    if not generates(config):  # the embedding stands in for the output layer, which nothing reads
        config.tie_word_embeddings = True
    if not wrapper:
        return config
    text: PretrainedConfig = config.get_text_config()
    # A model whose file has an output layer has it, tied or not.
    text.tie_word_embeddings = bool(config.tie_word_embeddings or text.tie_word_embeddings)
    for name in _SHARED:
        if name in written:
            setattr(text, name, written[name])
    return text


def _reason(error: Exception, written: Mapping[str, Any]) -> str:
    """What a config class had to say of settings, with the name of the one that it means."""
    kinds = written.get("layer_types") if "layer_types" in str(error) else None
    for kind in kinds if isinstance(kinds, list) else ():
        if isinstance(kind, str) and kind not in (*ALLOWED_LAYER_TYPES, "attention", "mamba"):
            return (
                f"layer_types has {kind!r}, which is no kind of layer; get the config.json that "
                "was published with the weights"
            )
    if isinstance(error, ZeroDivisionError):
        zeros = [name for name, value in written.items() if value == 0 and type(value) is int]
        return f"a number is divided by one that is 0; these are 0: {', '.join(zeros)}"
    return " ".join(_VALIDATOR.sub("", str(error)).split())


def generates(config: PretrainedConfig) -> bool:
    """Whether the model has an output layer. Models of embeddings, and those that classify, may
    have none."""
    names = config.architectures or ()
    return not any(name.endswith(("Model", "ForSequenceClassification")) for name in names)


def num_labels(config: PretrainedConfig) -> int:
    """What a sequence's classification has scores for; 0 if the model classifies nothing."""
    names = config.architectures or ()
    classifies = any(name.endswith("ForSequenceClassification") for name in names)
    return (config.num_labels or 0) if classifies else 0


def _as_llama(written: Mapping[str, Any]) -> dict[str, Any]:
    """InternLM 3's settings under Llama's names. Raises UnsupportedModelError for other layers."""
    bias, qkv_bias = (bool(written.get(name, False)) for name in ("bias", "qkv_bias"))
    if bias != qkv_bias:
        raise UnsupportedModelError(
            f"qkv_bias is {qkv_bias} and bias is {bias}, which is not supported for {_INTERNLM3}; "
            "expected the same"
        )
    about = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    others = {name: value for name, value in written.items() if name != "auto_map"}
    return {**others, **about, "attention_bias": bias, "mlp_bias": bias}


def config_to_write(folder: Path) -> dict[str, Any]:
    """What config.json of a model derived from the folder's says: of the texts' part alone."""
    written = dict(read_object(folder / "config.json"))
    if not _is_wrapper(written) and _family(written) != _INTERNLM3:
        return written
    config = load_config(folder)
    return {**config.to_dict(), "model_type": config.model_type}


def _is_wrapper(written: Mapping[str, Any]) -> bool:
    return _family(written) in _WRAPPERS and isinstance(written.get("text_config"), Mapping)


def _family(written: Mapping[str, Any]) -> str | None:
    """None if it is not a word, which transformers refuses."""
    family = written.get("model_type")
    return family if isinstance(family, str) else None
