"""load_tests/simulate.py in a small world: what docs/scaling.md says of routing and fairness."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

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
        replicas, seen = simulate.route(SMALL, routing)
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
        replicas, seen = simulate.route(world, routing)
        assert sum(replica.requests for replica in replicas) == world.requests
        running = sum(replica.load for replica in replicas)
        assert max(replica.load for replica in replicas) < 2 * running / len(replicas)
        fills, reads = (sum(getattr(r, key) for r in replicas) for key in ("fills", "reads"))
        found[routing] = [fills, reads, sum(map(len, seen))]
    assert found["haproxy"] == pytest.approx(found["hash"], rel=0.25)


def test_the_same_world_gives_the_same_numbers() -> None:
    first, again = (simulate.route(SMALL, "hash") for _ in range(2))
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
