"""What all tensors of an adapter's files have in common: how they are named, and their values."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from nybble.loaders.errors import AdapterError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    """Raises AdapterError unless the tensor has finite numbers of a dtype that is read."""
    if tensor.dtype not in _DTYPES:
        raise AdapterError(
            f"{path}: {key} is {tensor.dtype}, expected float32, float16 or bfloat16"
        )
    if not tensor.isfinite().all():
        raise AdapterError(f"{path}: {key} has values that are not finite")
