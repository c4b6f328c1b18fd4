"""Identifies the base model of a training run."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from nybble.loaders.gguf.index import INDEX, gguf_files

_SAMPLE = 4096  # bytes
_SAMPLES = 1024  # of a file


def base_digest(folder: Path) -> str:
    """A digest that differs if config, file headers or (nearly surely) weights differ.

    Only samples of the weights are read, spread over every file: training changes weights
    everywhere, and reading a large model whole takes minutes. Raises OSError, and CheckpointError
    if a GGUF file is gone.
    """
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    gguf = (folder / INDEX).is_file()
    if gguf:
        digest.update((folder / INDEX).read_bytes())
        paths = [file.path for file in gguf_files(folder)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            begin = 0
            if not gguf:  # whose index says what its files' headers do
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header, size)))
                begin = min(8 + header, size)
            for start in range(begin, size, max(_SAMPLE, size // _SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()
