"""Two bases have the same digest only if they are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.finetune.identity import base_digest
from nybble.loaders import resolve_model
from tests.loaders.gguf_files import random_model, write_gguf


@pytest.fixture
def gguf_base(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes a GGUF file into a folder of its own, whose norms begin with ``first``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(name: str, *, first: float | None = None) -> Path:
        model = random_model("llama")
        if first is not None:
            model.model.norm.weight.data[0] = first
        (tmp_path / name).mkdir()
        file = tmp_path / name / "model.gguf"
        return resolve_model(str(write_gguf(file, "llama", model, tiny_model(), kind="Q8_0")))

    return write


def test_a_gguf_file_with_other_weights_is_another_base(gguf_base: Callable[..., Path]) -> None:
    base = gguf_base("one")
    assert base_digest(gguf_base("copy")) == base_digest(base)
    assert base_digest(gguf_base("other", first=7.5)) != base_digest(base)
