"""``deterministic`` on the CPU: it holds with our kernels, and is refused without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nybble.engine import Engine, EngineConfig
from nybble.kernels.cpu import deterministic
from nybble.loaders import open_checkpoint

CONFIG = EngineConfig(deterministic=True, kv_cache_bytes=1 << 16, max_model_len=64)


def load(folder: Path, config: EngineConfig = CONFIG) -> Engine:
    return Engine.load(open_checkpoint(folder), config, progress=False)


def test_it_is_computed_by_the_kernels_that_take_no_other_way(
    tiny_model: Callable[..., Path],
) -> None:
    if deterministic.library() is None:
        pytest.skip("needs the C++ kernels")
    engine = load(tiny_model())
    assert isinstance(engine._runner.decoder.backend, deterministic.DeterministicLibrary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_than_bfloat16_are_refused_by_name(
    tiny_model: Callable[..., Path], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=f"deterministic: the dtype is {str(dtype)[6:]}"):
        load(tiny_model(), replace(CONFIG, dtype=dtype))


def test_a_machine_without_the_kernels_is_told_so(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deterministic, "library", lambda: None)
    with pytest.raises(ValueError, match="deterministic: the CPU kernels cannot run here"):
        load(tiny_model())


def test_a_weight_that_the_kernels_do_not_take_is_refused_with_its_group(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if deterministic.library() is None:
        pytest.skip("needs the C++ kernels")
    library = deterministic.deterministic_library(torch.bfloat16)
    from nybble.kernels.packed import SYMMETRIC_LEVELS, PackedWeight

    weight = PackedWeight(
        qweight=torch.zeros(16, 12, dtype=torch.uint8),
        scales=torch.ones(16, 2),
        zeros=None,
        levels=SYMMETRIC_LEVELS,
        out_features=16,
        in_features=24,
        group_size=12,
    ).to_layout("cpu_tiles")
    with pytest.raises(ValueError, match=r"deterministic: .* these are in groups of 12"):
        library.linear(weight, torch.bfloat16)
