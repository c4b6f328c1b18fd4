"""Writing safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file with the default permissions of the process; the library alone gives 0600.

    Raises OSError, for example if the disk is full, and leaves nothing behind then.
    """
    scratch = path.with_name(path.name + ".partial")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        save_file(dict(tensors), scratch, None if metadata is None else dict(metadata))
        scratch.chmod(mode)
        scratch.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
