"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nybble.loaders.adapter import MAX_RANK

_CHOICES = {
    "kv_dtype": ("auto", "int8", "fp8"),
    "speculate": ("off", "ngram", "draft", "mtp", "auto"),
    "activations": ("auto", "int8"),
}


def require_whole(name: str, value: object) -> None:
    """Raises ValueError, which names the setting, for what is no int.

    Programs set these too, whose types nobody has checked.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected a whole number")


@dataclass(frozen=True)
class AdapterConfig:
    """Memory for LoRA adapters.

    slots: adapters that one step can mix. A slot takes as much memory as the adapter in it.
    max_rank: the highest rank an adapter may have.
    host_bytes: host memory for adapters. On the CPU slots refer to it.
    own_settings: whether an adapter's own chat template, generation config and tokens are used.
    dtype: ``int8`` rounds the matrices of adapters to 8 bits, with a scale for each row, on the
        CPU; ``auto`` has them in the model's dtype.
    device_bytes: a GPU's memory for adapters in slots; None for as many of the highest rank, on all
        layers but experts, as there are slots.
    """

    slots: int = 8
    max_rank: int = 64
    host_bytes: int = 4 << 30
    own_settings: bool = True
    device_bytes: int | None = None
    dtype: Literal["auto", "int8"] = "auto"

    def __post_init__(self) -> None:
        for name in ("slots", "max_rank", "host_bytes"):
            require_whole(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.device_bytes is not None:
            require_whole("device_bytes", self.device_bytes)
            if self.device_bytes < 1:
                raise ValueError(f"device_bytes is {self.device_bytes}, expected at least 1")
        if self.dtype not in ("auto", "int8"):
            raise ValueError(f"dtype of adapters is {self.dtype!r}, expected auto or int8")
        if self.max_rank > MAX_RANK:
            raise ValueError(f"max_rank is {self.max_rank}, expected at most {MAX_RANK}")


@dataclass(frozen=True)
class EngineConfig:
    """Settings fixed for the life of an engine.

    device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU if there is one.
    dtype: of activations and weights that are not quantized.
    block_size: tokens in one KV block.
    kv_cache_bytes: memory for the KV cache. None is 1 GiB on the CPU; on a GPU it is what the
        weights leave free, less a tenth of the GPU's memory.
    kv_dtype: ``auto`` stores keys and values in dtype. ``int8`` and ``fp8`` (e4m3) take half the
        memory, with a scale for each head of each token. int8 is more accurate; fp8 needs an Ada
        or Hopper GPU.
    max_num_seqs: most sequences computed in one step.
    max_batched_tokens: the token budget of a step; longer prompts are prefilled in chunks.
    max_model_len: longest prompt plus output, in tokens; None for the model's own limit.
    max_waiting: requests queued beyond max_num_seqs before new ones are refused.
    prefix_caching: whether requests reuse KV blocks of earlier prompts with the same beginning.
    speculate: ``ngram`` verifies drafts found in each sequence's own tokens, ``draft`` those of a
        draft model, ``mtp`` those of a head that the model's checkpoint holds; ``auto`` those of
        either if there is one, and only as many as steps measured so far say are worth it; ``off``
        none. Outputs are the same with each.
    max_draft_tokens: the most draft tokens of a sequence in one step.
    deterministic: whether a request's logits are the same bit for bit alone and in any company.
        On a GPU that costs time: see docs/running.md.
    activations: ``int8`` rounds what 4- and 8-bit weights are multiplied with to 8 bits for each
        token and group of weights, which is faster on a CPU and less exact: see docs/running.md.
    adapters: None if the engine serves no adapters.
    tune: whether to time, at the start, GPU matmul shapes without a known configuration.
    tensor_parallel_size: ranks that compute the model together, each in a process of its own and
        with a part of every weight; on GPUs as many, from ``device`` on. kv_cache_bytes and the
        memory for adapters are those of each rank.
    restarts: how often within ten minutes the engine may restart after a failure, with the same
        weights.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    kv_cache_bytes: int | None = None
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    max_num_seqs: int = 64
    max_batched_tokens: int = 512
    max_model_len: int | None = None
    max_waiting: int = 256
    prefix_caching: bool = True
    speculate: Literal["off", "ngram", "draft", "mtp", "auto"] = "off"
    max_draft_tokens: int = 8
    deterministic: bool = False
    activations: Literal["auto", "int8"] = "auto"
    adapters: AdapterConfig | None = None
    tune: bool = True
    tensor_parallel_size: int = 1
    restarts: int = 0

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "kv_cache_bytes",
            "max_num_seqs",
            "max_batched_tokens",
            "max_draft_tokens",
            "max_model_len",
            "tensor_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None:
                require_whole(name, value)
                if value < 1:
                    raise ValueError(f"{name} is {value}, expected at least 1")
        for name, expected in _CHOICES.items():
            if getattr(self, name) not in expected:
                names = ", ".join(expected)
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {names}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens {self.max_batched_tokens} is below max_num_seqs "
                f"{self.max_num_seqs}: every running sequence needs one token of the budget"
            )
        for name in ("max_waiting", "restarts"):
            require_whole(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.restarts and self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, and ranks that have failed "
                "cannot begin again in the same process: the process has to exit, and a supervisor "
                "to start it (on_engine_failure 'exit')"
            )


def resolve_device(name: str) -> torch.device:
    """The device that ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` names.

    Raises ValueError, which says what is missing, if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ValueError(
            f"device is {name!r}, but this build of PyTorch ({torch.__version__}) is for the CPU; "
            "install a CUDA build or choose cpu"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but PyTorch finds no usable NVIDIA GPU (see nvidia-smi); "
            "choose cpu"
        )
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise ValueError(f"device is {name!r}, but this machine has {count} GPU(s)")
    major, minor = torch.cuda.get_device_capability(int(index or 0))
    if major < 8:
        raise ValueError(
            f"device is {name!r}, a GPU of compute capability {major}.{minor}; "
            "8.0 (Ampere) or newer is needed"
        )
    # This imports Triton, which only machines with a GPU need.
    from nybble.kernels.triton.device import check_compiler

    check_compiler(f"{name}, a GPU of compute capability {major}.{minor},", 10 * major + minor)
    return torch.device("cuda", int(index or 0))
