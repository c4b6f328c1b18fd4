"""Before the first request on a GPU: configurations are measured once, and memory is enough."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from nybble.engine import Engine, EngineConfig
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.runner import ModelRunner, free_kv_bytes
from nybble.kernels.bench.gpu_decode import random_decoder
from nybble.kernels.bench.gpu_section import LLAMA_2_13B
from nybble.kernels.triton import configs, tune
from nybble.loaders import open_checkpoint

from .device import CUDA, Device

CONFIG = EngineConfig(
    device="cuda:1",
    dtype=torch.float16,
    kv_cache_bytes=1 << 16,
    max_num_seqs=4,
    max_batched_tokens=16,
    max_model_len=64,
)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return configs.cache_path("Emulated GPU")


def test_an_unknown_gpu_is_tuned_by_measuring_at_the_first_start_and_not_at_the_next(
    gpu: Device, checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[configs.Config] = []

    def measured(weights: object, x: object, expected: object, config: configs.Config) -> float:
        """By the device's clock; the check of the result reads numbers that are not computed."""
        timed.append(config)
        calls = [lambda: tune.packed_matmul(x, weights[0], config)]  # type: ignore[index, arg-type]
        return tune.timing.milliseconds(calls, 1) + config.block_n / 1e6

    monkeypatch.setattr(tune, "tune_unknown", partial(tune.tune_unknown, measure=measured))
    gpu.computes = False
    for start in ("first", "second"):
        timed.clear()
        engine = Engine.load(open_checkpoint(checkpoint), CONFIG, progress=False)
        engine.warm_up(progress=False)
        if start == "first":
            assert len(set(timed)) > 20
            kept = json.loads(cache.read_text())
            assert kept
    assert timed == []
    assert json.loads(cache.read_text()) == kept


@pytest.mark.slow
def test_llama_2_13b_and_its_graphs_fit_a_10_gib_device_beside_the_cache_it_is_given(
    gpu: Device,
) -> None:
    gpu.total, gpu.has_numbers = 10 << 30, False
    config = EngineConfig(device="cuda:1", tune=False)
    with torch.inference_mode():
        decoder, _ = random_decoder(LLAMA_2_13B, config.dtype, CUDA)
        layout = KVCacheLayout.of(decoder.architecture, config, decoder.max_model_len)
        blocks = layout.blocks_in(free_kv_bytes(CUDA))
        runner = ModelRunner(decoder, config, layout, blocks)
    runner.warm_up(progress=False)  # the largest step there is, then the graphs
    assert max(seqs for _, seqs in runner._warm_up_sizes()) == config.max_num_seqs
    assert blocks * layout.block_bytes > 2 << 30
    assert gpu.peak > 9 << 30
