"""A tiny model as the engine sees it, without any file format in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from nybble.kernels import DenseWeight


@dataclass
class PlainCheckpoint:
    """A checkpoint read whole, its projections left separate."""

    folder: Path
    config: PretrainedConfig
    format: str = "none"

    def weights(self) -> Iterator[tuple[str, DenseWeight | Tensor]]:
        tensors = {k: v.float() for k, v in load_file(self.folder / "model.safetensors").items()}
        for name, tensor in tensors.items():
            if name.endswith(".bias"):
                continue
            if tensor.ndim == 2 and "embed_tokens" not in name:
                module = name.removesuffix(".weight")
                yield module, DenseWeight(tensor, tensors.get(module + ".bias"))
            else:
                yield name, tensor


@pytest.fixture(scope="session")
def plain_checkpoint(tiny_model: Callable[..., Path]) -> Callable[..., PlainCheckpoint]:
    """``plain_checkpoint(**options of tiny_model)``."""

    def build(**options: object) -> PlainCheckpoint:
        folder = tiny_model(**options)
        return PlainCheckpoint(folder, AutoConfig.from_pretrained(folder))

    return build


class Recomputed:
    """Stands in for a CUDA graph: computes again what was captured, from the same memory."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.out, self.replays = function, function(), 0

    def replay(self) -> None:
        self.out.copy_(self.function())
        self.replays += 1


@pytest.fixture(scope="session")
def recomputed() -> type[Recomputed]:
    return Recomputed


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
