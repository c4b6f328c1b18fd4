"""load_tests/simulate.py in a small world: what docs/scaling.md says of routing and fairness."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location(
    "simulate", Path(__file__).parents[1] / "load_tests/simulate.py"
)
assert _spec is not None
assert _spec.loader is not None
simulate = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = simulate  # where its dataclasses look for their types
_spec.loader.exec_module(simulate)

SMALL = simulate.World(
    replicas=8, rate=100, adapters=200, slots=16, host=24, service=0.5, seconds=10
)


@pytest.mark.parametrize("places", [(0, 1, 2), (0,)])
def test_a_tenant_that_floods_gets_no_more_than_half_where_the_other_asks(
    places: tuple[int, ...],
) -> None:
    for replica, tokens in enumerate(simulate.flooded(places, seconds=60)):
        share = tokens["quiet"] / tokens.total()
        assert tokens.total() > 40_000
        assert share == (pytest.approx(0.5, abs=0.02) if replica in places else 0)


def test_affinity_fills_fewer_adapters_than_random_routing_within_its_bound() -> None:
    fills, reads, adapters = {}, {}, {}
    for routing in simulate.ROUTINGS:
        fleet, seen = simulate.route(SMALL, routing)
        replicas = fleet.replicas
        assert sum(replica.requests for replica in replicas) == SMALL.requests
        fills[routing] = sum(replica.fills for replica in replicas)
        reads[routing] = sum(replica.reads for replica in replicas)
        adapters[routing] = sum(map(len, seen))
        running = sum(replica.load for replica in replicas)
        if routing == "hash":  # each took its last request within the bound of that moment
            assert max(replica.load for replica in replicas) < 2 * running / len(replicas)
    assert 1.5 * fills["hash"] < min(fills["random"], fills["two"])
    assert 1.5 * reads["hash"] < min(reads["random"], reads["two"])
    assert 1.5 * adapters["hash"] < min(adapters["random"], adapters["two"])


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_haproxy_itself_sends_requests_as_the_model_of_its_hash_does() -> None:
    found, world = {}, replace(SMALL, seconds=3)
    for routing in ("hash", "haproxy"):
        fleet, seen = simulate.route(world, routing)
        replicas = fleet.replicas
        assert sum(replica.requests for replica in replicas) == world.requests
        running = sum(replica.load for replica in replicas)
        assert max(replica.load for replica in replicas) < 2 * running / len(replicas)
        fills, reads = (sum(getattr(r, key) for r in replicas) for key in ("fills", "reads"))
        found[routing] = [fills, reads, sum(map(len, seen))]
    assert found["haproxy"] == pytest.approx(found["hash"], rel=0.25)


def test_the_same_world_gives_the_same_numbers() -> None:
    found = [simulate.route(SMALL, "hash") for _ in range(2)]
    first, again = ((fleet.replicas, fleet.took, seen) for fleet, seen in found)
    assert first == again


def test_a_slot_with_a_running_request_keeps_its_adapter() -> None:
    replica = simulate.Replica(slot_count=1, host_count=2)
    replica.begin(1)
    replica.begin(2)
    assert (list(replica.slots), replica.fills, replica.without_slot) == ([1], 2, 1)
    replica.end(1)
    replica.begin(3)
    assert list(replica.slots) == [3]
    assert list(replica.host) == [2, 3]


CALIBRATION = {
    "step_seconds": {"1": 0.02, "4": 0.05},
    "prefill_rate": 1000.0,
    "fill_seconds": 0.25,
    "read_seconds": 0.5,
}


@pytest.fixture
def calibrated(tmp_path: Path) -> Any:
    """``calibrated(**fields)``: a world of one replica, and the file of its calibration."""

    def make(**fields: Any) -> Any:
        file = tmp_path / "calibration.json"
        file.write_text(json.dumps(CALIBRATION | fields))
        found = simulate.Calibration.read(file)
        return simulate.World(
            replicas=1, slots=2, host=2, prompt=100, tokens=10, calibration=found
        ), file

    return make


def test_a_request_takes_what_was_measured(calibrated: Any) -> None:
    """Steps as long as their sequences make them, and the prompts of the others beside."""
    world, _ = calibrated()
    steps = {1: 0.02, 2: 0.03, 4: 0.05, 7: 0.08}  # between by straight lines, and beyond
    for load, step in steps.items():
        assert world.request_seconds(load) == pytest.approx(load * 0.1 + 10 * step)
    assert simulate.World().request_seconds(7) == 6.5
    steep = calibrated(step_seconds={"4": 0.01, "8": 1})[0]
    assert steep.request_seconds(1) == pytest.approx(0.1 + 10 * 0.01)
    falling = calibrated(step_seconds={"1": 0.02, "4": 0.01})[0]
    assert falling.request_seconds(100) == pytest.approx(10 + 10 * 0.02)


def test_requests_share_a_replica_and_wait_for_their_adapters(calibrated: Any) -> None:
    world, _ = calibrated()
    ends: list[tuple[int, int]] = []
    fleet = simulate.Fleet(world, lambda at, adapter: ends.append((at, adapter)))
    alone, two = world.request_seconds(1), world.request_seconds(2)
    fleet.begin(0, 7, 0.0)  # is read, and copied
    fleet.until(100.0)
    assert fleet.took == [pytest.approx(alone + 0.75)]
    fleet.begin(0, 7, 100.0)  # is there
    fleet.until(200.0)
    assert fleet.took[1:] == [pytest.approx(alone)]
    # Half of one alone, then both at the speed of two, then the rest of the other alone.
    fleet.begin(0, 7, 200.0)
    fleet.begin(0, 7, 200.0 + alone / 2)
    assert fleet.total == 2
    fleet.until(300.0)
    first = alone / 2 + two / 2
    assert fleet.took[2:] == [pytest.approx(first), pytest.approx(first)]
    assert ends == [(0, 7)] * 4
    assert fleet.total == fleet.replicas[0].load == 0


def test_a_fleet_that_is_too_small_shows_as_times_that_grow(calibrated: Any) -> None:
    world, _ = calibrated()
    medians = []
    for rate in (0.5, 4, 16):
        fleet, _ = simulate.route(replace(world, rate=rate, adapters=2, seconds=30), "random")
        medians.append(statistics.median(fleet.took))
    assert medians[0] < medians[1] < 0.2 * medians[2]


def test_a_calibration_adds_the_times_of_requests_to_the_table(
    calibrated: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file = calibrated()
    options = "--replicas 8 --rate 4 --adapters 20 --slots 8 --host 16 --prompt 100 --tokens 10"
    simulate.main(["capacity", *options.split(), "--seconds", "20", "--calibration", str(file)])
    first, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "of 100 + 10 tokens, 0.3 s alone" in first
    assert head.split(" | ")[-2:] == ["seconds p50", "p99 |"]
    assert all(0.3 <= float(row.split("|")[-3]) < 1.1 for row in rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_seconds": {"1": 0.02}}, "expected step_seconds of two numbers of sequences"),
        ({"step_seconds": {"1": 0.02, "2": 0}}, "all above 0"),
        ({"step_seconds": {"one": 0.02}}, "is not what calibrate.py writes: ValueError"),
        ({"step_seconds": [1]}, "is not what calibrate.py writes"),
        ({"prefill_rate": -1}, "all above 0"),
        ({"prefill_rate": None}, "is not what calibrate.py writes"),
        ({"read_seconds": float("nan")}, "fill_seconds and read_seconds from 0 on"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(
    calibrated: Any, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], message: str
) -> None:
    _, file = calibrated()
    file.write_text(json.dumps(CALIBRATION | fields))
    with pytest.raises(SystemExit, match="2"):
        simulate.main(["capacity", "--calibration", str(file)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--replicas 8 --rate 100 --adapters 200 --slots 8 --host 16 --service 0.5"
    simulate.main(["capacity", *options.split(), "--seconds", "2"])
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split()[1] for row in rows] == list(simulate.ROUTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: command"),
        ("capacity --replicas 1", "--replicas: 1 is not a number from 2 on"),
        ("capacity --rate 0", "--rate: 0 is not a number from 0.001 on"),
        ("capacity --rate inf", "--rate: inf is not a number"),
        ("capacity --rate 0.01 --seconds 1", "--rate 0.01 for --seconds 1 is not one request"),
        ("capacity --adapters 0", "--adapters: 0 is not a number from 1 on"),
        ("capacity --adapters 2.5", "--adapters: invalid int value: '2.5'"),
        ("capacity --zipf -1", "--zipf: -1 is not a number from 0 on"),
        ("capacity --zipf nan", "--zipf: nan is not a number"),
        ("capacity --slots 0", "--slots: 0 is not a number"),
        ("capacity --host 0", "--host: 0 is not a number"),
        ("capacity --calibration /nowhere.json", "No such file or directory: '/nowhere.json'"),
        ("capacity --tokens 0", "--tokens: 0 is not a number from 1 on"),
        ("capacity --service 0", "--service: 0 is not a number"),
        ("capacity --seconds -3", "--seconds: -3 is not a number"),
        ("fairness --replicas 3", "unrecognized arguments: --replicas 3"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        simulate.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_is_measured_and_its_simulation_compared(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "calibration.json"
    options = "--streams 1,2 --rounds 1 --words 20 --tokens 8 --check 6 --device cpu"
    script = Path(__file__).parents[1] / "load_tests/calibrate.py"
    done = subprocess.run(
        [sys.executable, script, file, "--model", tiny_model(max_length=512), *options.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = simulate.Calibration.read(file)
    assert found.step_seconds.keys() == {1, 2}
    assert json.loads(file.read_text())["machine"]
    real, simulated = done.stdout.splitlines()[:2]
    assert re.match(r"real: \d+ requests of \d+ \+ 8 tokens", real)
    assert re.match(r"simulated: \d+ requests of \d+ \+ 8 tokens", simulated)
