"""The emulated GPU, and a tiny 4-bit model for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

# Those two look at torch.cuda when they are first imported: before there seems to be a GPU.
import bitsandbytes
import pytest
import torch
import torch._dynamo

from nybble.kernels.triton import matmul
from nybble.quantizers import quantize_checkpoint

from .device import CUDA, DEVICE, Device
from .install import fake_cuda

__all__ = ["bitsandbytes"]


@pytest.fixture
def gpu() -> Iterator[Device]:
    """``torch.cuda`` is the emulated device, as if freshly started; this thread uses it."""
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU has `make gpu`")
    gc.collect()
    DEVICE.start_anew()
    with fake_cuda():
        torch.cuda.set_device(CUDA)
        yield DEVICE
    matmul.arrivals.cache_clear()  # counters on the device


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """One layer, which the interpreter gets through in a second a step."""
    folder = tmp_path_factory.mktemp("gptq") / "model"
    source = tiny_model(family="qwen2", layers=1)
    quantize_checkpoint(source, folder, format="gptq", group_size=32, progress=False)
    return folder
