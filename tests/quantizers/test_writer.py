"""A folder that is written is complete, or there is none: also if the end of writing fails."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from nybble.finetune.lora import LoRASettings, save_adapter
from nybble.loaders import open_checkpoint, safetensors_file, save_packed
from nybble.models import architecture_of
from nybble.quantizers import quantize_checkpoint, writer


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full, interrupted])
@pytest.mark.parametrize("step", ["write_safetensors", "copy_side_files"])
def test_quantizing_that_fails_at_the_end_leaves_nothing(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: Callable[..., None],
) -> None:
    """A small model's tensors are all written at the end."""
    monkeypatch.setattr(writer, step, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        quantize_checkpoint(tiny_model(), tmp_path / "out", format="nf4", progress=False)
    assert list(tmp_path.iterdir()) == []


def half_of_it(tensors: Any, path: Path, metadata: Any) -> None:
    Path(path).write_bytes(b"half")
    raise SafetensorError("No space left on device")


def test_a_file_that_cannot_be_written_whole_is_not_there(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has a config would be taken for an adapter."""
    monkeypatch.setattr(safetensors_file, "save_file", half_of_it)
    tensors = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(1)}
    about = architecture_of(open_checkpoint(tiny_model()).config)
    with pytest.raises(OSError, match=r"adapter_model.safetensors cannot be written: No space"):
        save_adapter(tmp_path / "adapter", tensors, LoRASettings(), "base", about)
    assert list((tmp_path / "adapter").iterdir()) == []
    with pytest.raises(OSError, match="No space"):
        save_packed(open_checkpoint(tiny_model()), tmp_path / "p", layout="rows", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
