"""What is fuzzed: each target takes bytes and raises where hostile input brings another error than
the one that callers are told to expect.

Bytes become input in two ways: as they are, or as a list of changes to a valid example, which gets
past the first checks.
"""

from __future__ import annotations

import atexit
import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import Qwen2Config

from nybble.engine import ParameterError
from nybble.loaders import open_checkpoint
from nybble.loaders.adapter import load_adapter
from nybble.loaders.errors import AdapterError, CheckpointError
from nybble.models import UnsupportedModelError, architecture_of
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.messages_schema import CountTokensRequest, MessagesRequest
from nybble.server.api.openapi import BODIES
from nybble.server.api.parse import parse_body
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest
from nybble.server.http.errors import ApiError

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, math.inf),
    *("", "a", "text", "\x00", "\ud800", "(", "a" * 300, "function", "../x", "user"),
    *([], [None], [[]], [1, 2], ["a"], {}, {"a": 1}, {"type": "function"}, [{}], {"": []}),
]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value but the top."""
    keys = node.keys() if isinstance(node, dict) else range(len(node) if _is_list(node) else 0)
    inner = [(*path, key) for key in keys]
    return inner + [found for at in inner for found in places(node[at[-1]], at)]


def _is_list(node: Any) -> bool:
    return isinstance(node, list)


def changed(valid: Any, data: bytes) -> bytes:
    """``valid`` as JSON with up to four changes that ``data`` describes, two bytes each."""
    value = copy.deepcopy(valid)
    for at in range(0, min(len(data) - 1, 8), 2):
        every = places(value)
        if not every:
            break
        *path, key = every[data[at] % len(every)]
        node = value
        for step in path:
            node = node[step]
        choice = data[at + 1] % (len(VALUES) + 2)
        if choice < len(VALUES):
            node[key] = copy.deepcopy(VALUES[choice])
        elif choice == len(VALUES):
            del node[key]
        else:  # what belongs elsewhere
            other: Any = value
            for step in every[data[at] // 2 % len(every)]:
                other = other[step]
            node[key] = copy.deepcopy(other)
    return json.dumps(value).encode()


_SCORES = [{"model": "m", "text_1": "a", "text_2": ["b", "c"]}]
_RANKINGS = [{"model": "m", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {"5": 1},
            "stop": ["a"],
            "max_completion_tokens": 5,
        }
    ],
    "/v1/completions": [
        {"model": "m", "prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 1, "seed": 5},
        {"model": "m", "prompt": [[1, 2], [3]], "best_of": 1, "temperature": 0.5, "top_k": -1},
    ],
    "/v1/responses": [
        {
            "model": "m",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "x"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "max_output_tokens": 5,
        }
    ],
    "/v1/messages": [
        {
            "model": "m",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}],
                },
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "disabled"},
        }
    ],
    "/v1/messages/count_tokens": [
        {"model": "m", "messages": [{"role": "user", "content": "a"}], "system": "s"}
    ],
    "/abort_request": [{"rid": "r"}],
    "/v1/embeddings": [{"model": "m", "input": ["a", "b"], "encoding_format": "base64"}],
    "/score": _SCORES,
    "/v1/score": _SCORES,
    "/rerank": _RANKINGS,
    "/v1/rerank": _RANKINGS,
    "/v2/rerank": _RANKINGS,
    "/tokenize": [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}],
    "/detokenize": [{"tokens": [1, 2]}],
}


def request_body(data: bytes) -> None:
    """A body is parsed, and read as far as it goes without a model, or refused."""
    kinds = list(BODIES)
    path = kinds[data[0] % len(kinds)] if data else kinds[0]
    way, rest = (data[1] if len(data) > 1 else 0), data[2:]
    examples = EXAMPLES[path]
    sent = rest if way % 4 == 0 else changed(examples[way % len(examples)], rest)
    try:
        body = parse_body(sent, BODIES[path])
        if isinstance(body, ResponsesRequest | MessagesRequest | CountTokensRequest):
            body = body.chat()
        if isinstance(body, ChatRequest | CompletionRequest):
            body.sampling_params(1, None, {})
    except (ApiError, ParameterError) as error:
        _one_line(error)


@lru_cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nybble-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@lru_cache
def _model() -> tuple[dict[str, Any], bytes]:
    """config.json and model.safetensors of a small model."""
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    ).to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8}}
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 8),
        "model.norm.weight": torch.ones(8),
        "model.layers.0.input_layernorm.weight": torch.ones(8),
        "model.layers.0.post_attention_layernorm.weight": torch.ones(8),
        "lm_head.weight": torch.zeros(8, 8),
    }
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    for name in (*(attention + f"{each}_proj" for each in "qkvo"), mlp + "down_proj"):
        tensors |= {
            f"{name}.qweight": torch.zeros(1, 8, dtype=torch.int32),
            f"{name}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
            f"{name}.scales": torch.ones(1, 8, dtype=torch.float16),
            f"{name}.g_idx": torch.zeros(8, dtype=torch.int32),
        }
    tensors |= {attention + f"{each}_proj.bias": torch.zeros(8) for each in "qkv"}
    tensors |= {mlp + f"{each}_proj.weight": torch.zeros(8, 8) for each in ("gate", "up")}
    return config, save(tensors)


def checkpoint(data: bytes) -> None:
    """A checkpoint with a strange config.json or safetensors file is read or refused."""
    config, tensors = _model()
    way, rest = (data[0] if data else 0), data[1:]
    _write("config.json", rest if way % 4 == 0 else changed(config, rest if way % 2 else b""))
    _write("model.safetensors", tensors if way % 2 else spoiled(tensors, rest))
    try:
        found = open_checkpoint(_folder())
        architecture_of(found.config)
        for _ in found.weights():
            pass
    except (CheckpointError, UnsupportedModelError) as error:
        _one_line(error)


@lru_cache
def _adapter() -> tuple[dict[str, Any], bytes, dict[str, tuple[int, int]]]:
    config = Qwen2Config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["o_proj"],
        "exclude_modules": [],
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"o_proj": 4},
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "bias": "none",
        "init_lora_weights": True,
    }
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
    return settings, save(tensors), architecture_of(config)


def adapter(data: bytes) -> None:
    """An adapter with strange settings or tensors is read or refused."""
    settings, tensors, architecture = _adapter()
    way, rest = (data[0] if data else 0), data[1:]
    _write(
        "adapter_config.json", rest if way % 4 == 0 else changed(settings, rest if way % 2 else b"")
    )
    _write("adapter_model.safetensors", tensors if way % 2 else spoiled(tensors, rest))
    try:
        load_adapter(_folder(), architecture)
    except AdapterError as error:
        _one_line(error)


def spoiled(valid: bytes, data: bytes) -> bytes:
    """``valid`` with bytes written over it or cut off, most often in the header."""
    found = bytearray(valid)
    for at in range(0, min(len(data) - 2, 24), 3):
        place = (data[at] | data[at + 1] << 8) % len(found)
        found[place] = data[at + 2]
    return bytes(found[: data[0] * 4]) if data and data[0] < 64 else bytes(found)


def _one_line(error: Exception) -> None:
    assert "\n" not in str(error), error


def _write(name: str, content: bytes) -> None:
    (_folder() / name).write_bytes(content)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request_body": request_body,
    "checkpoint": checkpoint,
    "adapter": adapter,
}
