"""Configurations come from the measured table or else the rule, never from a trial at run time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from nybble.kernels.triton import configs, tune
from nybble.kernels.triton.configs import Config, balanced_splits, bucket_of, default_config
from nybble.kernels.triton.tune import search
from nybble.kernels.triton.warmup import warmup

MEASURED = Config(64, 8, 7, num_warps=4, num_stages=5, scale_first=False)


def test_a_batch_runs_with_the_kernels_of_its_bucket() -> None:
    assert [bucket_of(rows) for rows in (1, 8, 9, 100, 8192, 20000)] == [2, 8, 16, 128, 8192, 8192]
    assert default_config(9, 4096, 4096) == default_config(16, 4096, 4096)


def test_few_rows_are_split_until_most_of_132_processors_read() -> None:
    for out, columns in ((4096, 4096), (896, 4864), (22016, 4096), (4096, 11008)):
        for rows in (1, 16):
            config = default_config(rows, out, columns)
            assert -(-out // config.block_n) * config.splits * config.parts >= 110
    assert balanced_splits(blocks=1000, steps=32, processors=132) == 1


def test_a_last_wave_that_would_leave_processors_idle_is_split_among_them() -> None:
    for rows, out in ((512, 12288), (1024, 6144), (1024, 22016)):
        config = default_config(rows, out, 4096)
        assert config.tail > 0
        assert config.splits > 1
        blocks_n, blocks_m = -(-out // config.block_n), -(-rows // config.block_m)
        assert (blocks_n - config.tail) * blocks_m % 132 == 0
        assert config.tail * blocks_m * config.splits <= 132
    assert default_config(1024, 132 * 128, 4096).tail == 0  # whole waves


def test_a_part_is_never_shorter_than_four_steps() -> None:
    assert balanced_splits(blocks=1, steps=7, processors=132) == 1


def test_measured_choices_override_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = (True, 128, 4096, 4096, 8)
    assert configs.choose("GPU 9", 100, 90, *shape) == default_config(8, 4096, 4096, 100)
    path = configs.cache_path("GPU 9")
    configs.write(path, "GPU 9", {configs.key_of(*shape): MEASURED})
    configs.write(path, "GPU 9", {"another": MEASURED})
    assert configs.choose("GPU 9", 100, 90, *shape) == MEASURED
    assert configs.choose("GPU 8", 100, 90, *shape) == default_config(8, 4096, 4096, 100)
    assert set(configs.tuned("GPU 9")) == {configs.key_of(*shape), "another"}


def test_the_search_keeps_what_is_faster_and_passes_over_what_does_not_run() -> None:
    start = replace(MEASURED, num_stages=2, splits=4)

    def measure(config: Config) -> float:
        if config.num_stages > 4:
            return float("inf")
        return 10.0 - config.num_stages + abs(config.splits - 8) + config.dense

    best = search(start, measure)
    assert (best.num_stages, best.splits, best.dense) == (4, 8, False)
    assert search(start, lambda config: 1.0) == start


def test_tuning_times_real_products_and_names_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CACHE_BYTES", 0)
    monkeypatch.setattr(tune, "neighbours", lambda config: [replace(config, num_stages=2)])
    weights = list(tune.random_weights(256, 64, torch.device("cpu")))
    best = tune.tune(weights, torch.float16, 2, progress=False)
    assert set(best) == {"affine g128 64x256 m2", "affine g32 64x256 m2", "codebook g64 64x256 m2"}


def test_warming_up_runs_each_kind_of_weight_once_for_each_bucket() -> None:
    weights = list(tune.random_weights(256, 64, torch.device("cpu")))
    assert warmup([*weights, *weights], torch.float16, 9, progress=False) == 3 * 4
