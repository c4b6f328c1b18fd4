"""What all tensors of an adapter's files have in common: how they are named, and their values."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from nybble.loaders.errors import AdapterError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Beyond it a number is infinite in float16, in which a model may be computed; no weight of a model
# that computes anything is.
LARGEST = torch.finfo(torch.float16).max
_PREFIXES = ("base_model.model.", "_orig_mod.", "module.")
# Prefixes of the text model's layers inside larger models.
AROUND = re.compile(r"((model|backbone|language_model|text_model|llm|thinker|module|_orig_mod)\.)*")


def after_prefixes(name: str) -> str:
    """A name as the trained model has it, without what peft and torch put before it."""
    while prefix := next((each for each in _PREFIXES if name.startswith(each)), None):
        name = name.removeprefix(prefix)
    return name


def inner_name(name: str) -> str:
    """A module's name inside the text model, in whichever model that is."""
    match = AROUND.match(name)
    return name if match is None else name[match.end() :]


def check_values(path: Path, key: str, tensor: Tensor) -> None:
    """Raises AdapterError unless the tensor has numbers of a dtype that is read, all of which are
    finite in 16 bits too."""
    if tensor.dtype not in _DTYPES:
        raise AdapterError(
            f"{path}: {key} is {tensor.dtype}, expected float32, float16 or bfloat16"
        )
    largest = greatest(tensor)
    if not math.isfinite(largest):
        raise AdapterError(f"{path}: {key} has values that are not finite")
    if largest > LARGEST:
        raise AdapterError(
            f"{path}: {key} has a value of {largest:.3g}, and {LARGEST:.0f} is the most that a "
            "model in 16 bits computes with"
        )


def greatest(tensor: Tensor) -> float:
    """The greatest absolute value; infinity if one is no number. 0 of an empty tensor."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(-low.item(), high.item()) if low.isfinite() and high.isfinite() else math.inf
