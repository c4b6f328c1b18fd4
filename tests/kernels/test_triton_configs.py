"""Configurations come from the measured table or else the rule, never from a trial at run time."""

import heapq
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from nybble.kernels.triton import configs, tune
from nybble.kernels.triton.configs import Config, balanced_splits, bucket_of, default_config
from nybble.kernels.triton.matmul import chosen
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


@pytest.mark.parametrize(
    ("out", "columns", "processors"),
    [
        (5120, 5120, 132),  # Llama-2-13B's o
        (5120, 13824, 132),
        (5120, 5120, 114),
        (4096, 14336, 132),  # Llama-3-8B's down: every block has two processors
        (4608, 3584, 132),  # Qwen2.5-7B's qkv
        (12288, 4096, 132),  # Llama-2-7B's qkv: 132 whole blocks before 60 in two parts
    ],
)
def test_two_unequal_parts_of_blocks_that_leave_processors_idle_save_a_tenth(
    out: int, columns: int, processors: int
) -> None:
    """Programs begin in order of their numbers, each on the first processor that is free."""
    config = default_config(256, out, columns, processors)
    blocks, steps = out // 128 * 2, columns // 128
    assert (config.block_n, config.block_m, config.splits) == (128, 128, 2)
    split = 2 * config.tail or blocks
    first = round(config.lead * steps)

    def ends(first: int) -> tuple[float, float]:
        """When the last first part and the last second part are done."""
        free = [0.0] * processors

        def done(programs: int, lasts: float) -> float:
            return max(heapq.heappushpop(free, free[0] + lasts) + lasts for _ in range(programs))

        if blocks > split:
            done(blocks - split, 1.5 + steps)
        return done(split, 1.5 + first), done(split, 1.5 + steps - first + 2.7)

    firsts, seconds = ends(first)
    assert seconds <= firsts  # first parts find them when they are done
    firsts_sooner, seconds_later = ends(first - 1)
    assert seconds_later > firsts_sooner
    waves = -(-blocks // processors)
    assert firsts + 2.7 <= 0.9 * waves * (1.5 + steps)


def test_parts_are_even_or_none_where_unequal_ones_save_less() -> None:
    # Three quarters of 32 steps, and what moving the others costs; and three for each block.
    for out, columns, splits in ((6144, 4096, 1), (2560, 5120, 3)):
        config = default_config(256, out, columns)
        assert (config.splits, config.lead) == (splits, 0.0)


def test_a_table_from_before_a_field_existed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    older = {
        name: value for name, value in asdict(MEASURED).items() if name not in ("tail", "lead")
    }
    path.write_text(json.dumps({"GPU 9": {"key": older}}))
    assert configs.read(path) == {"GPU 9": {"key": MEASURED}}
    unequal = replace(MEASURED, splits=2, lead=29 / 40)
    configs.write(path, "GPU 9", {"another": unequal})
    assert configs.read(path) == {"GPU 9": {"key": MEASURED, "another": unequal}}


def test_the_tuner_tries_unequal_parts_where_there_are_many_rows() -> None:
    many = default_config(256, 6144, 4096)
    assert {c.lead for c in tune.neighbours(many)} > {0.0}
    unequal = default_config(256, 5120, 5120)
    near = {(c.splits, c.lead) for c in tune.neighbours(unequal)}
    assert {(2, 0.675), (2, 0.775), (2, 0.0), (1, 0.0), (4, 0.0)} <= near
    assert {c.lead for c in tune.neighbours(default_config(16, 4096, 4096))} == {0.0}


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


WEIGHTS = 3  # of tune.random_weights, each of another kind


def two_at_a_time(config: Config) -> list[Config]:
    return [replace(config, num_stages=2)]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is really timed, and the cache is this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "CACHE_BYTES", 0)
    monkeypatch.setattr(tune, "neighbours", two_at_a_time)
    configs.tuned.cache_clear()
    configs.choose.cache_clear()


def favours_two_stages(_weights: object, _x: object, _expected: object, config: Config) -> float:
    return float(config.num_stages)


@pytest.mark.usefixtures("quick")
def test_what_a_start_tunes_is_used_and_not_tuned_again(caplog: pytest.LogCaptureFixture) -> None:
    weights = list(tune.random_weights(256, 64, torch.device("cpu")))
    told: list[tuple[str, int, int | None]] = []

    def start(**options: Any) -> int:
        return tune.tune_unknown(
            weights,
            torch.float16,
            2,
            **{"measure": favours_two_stages, "progress": False} | options,
        )

    assert start(progress=lambda *report: told.append(report)) == WEIGHTS
    assert told == [("Tuning matmuls", done, WEIGHTS) for done in range(WEIGHTS + 1)]
    assert chosen(weights[0], 1, torch.device("cpu")).num_stages == 2
    assert start(measure=None) == 0  # or it would have been called

    # Other sources, or another Triton, have a file of their own.
    path = configs.cache_path("interpreter")
    for changed, value in (("triton.__version__", "99"), ("_MEASURED_SOURCES", ("matmul.py",))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(changed if "." in changed else f"{configs.__name__}.{changed}", value)
            configs.kernels_digest.cache_clear()
            assert configs.cache_path("interpreter") != path
        configs.kernels_digest.cache_clear()
    assert configs.cache_path("interpreter") == path

    # A file that is broken is said to be, and replaced.
    for content in ("{", "[]", '{"interpreter": {"x": {"no": 1}}}', '{"interpreter": 5}'):
        path.write_text(content)
        configs.tuned.cache_clear()
        configs.choose.cache_clear()
        caplog.clear()
        assert chosen(weights[0], 1, torch.device("cpu")).num_stages == 3
        assert "is not used" in caplog.text
        assert start() == WEIGHTS
        assert set(configs.read(path)["interpreter"]) == set(configs.tuned("interpreter"))


@pytest.mark.usefixtures("quick")
def test_tuning_ends_in_time_and_the_next_start_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = list(tune.random_weights(256, 64, torch.device("cpu")))
    clock = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])

    def takes_half_a_minute(*product: Any) -> float:
        clock[0] += 30
        return favours_two_stages(*product)

    def start() -> int:
        return tune.tune_unknown(
            weights,
            torch.float16,
            2,
            minutes=2,
            measure=takes_half_a_minute,
            progress=False,
        )

    # Two measurements a search: the second one ends with the two minutes, and counts for nothing.
    assert start() == 1
    assert len(configs.tuned("interpreter")) == 1
    assert [start(), start(), start()] == [1, 1, 0]


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_ends_tuning_and_not_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune, "write_cache", full)
    weights = tune.random_weights(256, 64, torch.device("cpu"))
    found = tune.tune_unknown(weights, torch.float16, 2, measure=favours_two_stages, progress=False)
    assert found == 0
    assert "No space left" in caplog.text


def test_warming_up_runs_each_kind_of_weight_once_for_each_bucket() -> None:
    weights = list(tune.random_weights(256, 64, torch.device("cpu")))
    assert warmup([*weights, *weights], torch.float16, 9, "silu", progress=False) == 3 * 4
