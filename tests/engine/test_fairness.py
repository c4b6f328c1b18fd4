"""Tenants share the engine by weight, whatever one of them does."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine import ParameterError, Request, SamplingParams
from nybble.engine.block_manager import BlockManager
from nybble.engine.fair_queue import FairQueue
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence

SEATS, BUDGET, BLOCKS, BLOCK = 16, 256, 1024, 16


@dataclass
class Simulation:
    """A scheduler driven by a clock: a step takes 1, and up to 4 more with its budget's use.

    Half the seats, budget and blocks make an engine of half the speed: a tenant's equal share.
    """

    seats: int = SEATS
    budget: int = BUDGET
    blocks: int = BLOCKS
    now: float = 0.0
    started: dict[str, float] = field(default_factory=dict)
    first_token: dict[str, float] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        manager = BlockManager(self.blocks, BLOCK, prefix_caching=False)
        self.scheduler = Scheduler(manager, self.seats, self.budget)

    def run(
        self,
        arrivals: list[tuple[float, str, int, int, float]],
        until: float,
        until_first_token_of: str = "",
    ) -> None:
        """arrivals: (time, tenant, prompt tokens, output tokens, weight), in the order of time."""
        pending = list(reversed(arrivals))
        while self.now < until and until_first_token_of not in self.first_token:
            while pending and pending[-1][0] <= self.now:
                time, tenant, length, output, weight = pending.pop()
                name = f"{tenant} {len(self.started)}"
                self.started[name] = time
                request = Request(
                    name,
                    tuple(range(length)),
                    SamplingParams(max_tokens=output),
                    tenant=tenant,
                    weight=weight,
                )
                self.scheduler.add(Sequence(request, output, None, None))  # type: ignore[arg-type]
            batch = self.scheduler.schedule()
            tokens = sum(item.num_tokens for item in batch)
            assert tokens <= self.budget
            assert len(self.scheduler.running) <= self.seats
            self.now += 1.0 + 4.0 * tokens / self.budget
            for item in batch:
                sequence, completes = item.sequence, item.completes
                self.scheduler.computed(item)
                self.served[sequence.tenant] += item.num_tokens
                if completes:
                    name = sequence.request_id
                    self.first_token.setdefault(name, self.now - self.started[name])
                    sequence.token_ids.append(0)
                    if sequence.num_output_tokens >= sequence.max_tokens:
                        self.scheduler.finish(sequence)

    def p95(self, tenant: str) -> float:
        times = sorted(t for name, t in self.first_token.items() if name.startswith(tenant + " "))
        assert len(times) > 50
        return times[int(0.95 * len(times))]


def polite(seed: int, weight: float = 1.0) -> list[tuple[float, str, int, int, float]]:
    """A tenant well within half of the engine."""
    rng = random.Random(seed)
    time, arrivals = 0.0, []
    for _ in range(150):
        time += rng.expovariate(1 / 30)
        arrivals.append((time, "polite", rng.randint(20, 200), rng.randint(5, 40), weight))
    return arrivals


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        pytest.param(40, 200, id="decodes", marks=pytest.mark.slow),
        pytest.param(900, 20, id="prompts"),
        pytest.param(200, 60, id="both"),
        pytest.param(16, 100, id="short", marks=pytest.mark.slow),
        pytest.param(4000, 4, id="long", marks=pytest.mark.slow),
    ],
)
def test_beside_a_flood_first_tokens_come_no_later_than_at_equal_share(
    seed: int, prompt: int, output: int
) -> None:
    arrivals = polite(seed)
    end = arrivals[-1][0]
    alone = Simulation(seats=SEATS // 2, budget=BUDGET // 2, blocks=BLOCKS // 2)
    alone.run(arrivals, end)
    flood = [(i * 0.5, "flood", prompt, output, 1.0) for i in range(int(end))]
    shared = Simulation()
    shared.run(sorted(arrivals + flood), end)
    assert shared.scheduler.waiting.tenants == {"flood"} or len(shared.scheduler.waiting) > 50
    assert shared.p95("polite") <= alone.p95("polite")
    # What the polite tenant leaves is not wasted.
    assert shared.served["flood"] > shared.served["polite"]


def test_backlogged_tenants_are_served_in_proportion_to_their_weights() -> None:
    simulation = Simulation()
    arrivals = [
        (0.0, tenant, 100, 50, weight)
        for _ in range(400)
        for tenant, weight in (("a", 1.0), ("b", 3.0))
    ]
    simulation.run(arrivals, 2500)
    assert set(simulation.scheduler.waiting.tenants) == {"a", "b"}, "both must be backlogged"
    assert simulation.served["b"] / simulation.served["a"] == pytest.approx(3, rel=0.02)


def test_a_tenant_alone_has_the_whole_engine() -> None:
    simulation = Simulation()
    simulation.run([(0.0, "a", 30, 20, 1.0)] * 40, 20)
    assert len(simulation.scheduler.running) == SEATS


def test_staying_away_saves_up_nothing() -> None:
    """After a long absence a tenant shares equally; it does not push the other out."""
    simulation = Simulation()
    simulation.run([(0.0, "busy", 100, 30, 1.0)] * 2000, 2000)
    before = simulation.served.copy()
    simulation.run([(2000.0, "back", 100, 30, 1.0)] * 600, 3500)
    gained = {tenant: simulation.served[tenant] - before[tenant] for tenant in ("busy", "back")}
    assert len(simulation.scheduler.waiting) > 100
    assert gained["back"] / gained["busy"] == pytest.approx(1, rel=0.15)


def test_requests_of_one_tenant_start_in_the_order_of_arrival() -> None:
    simulation = Simulation(seats=2)
    simulation.run([(float(i), "a", 50, 5, 1.0) for i in range(20)], 2000)
    order = list(simulation.first_token)
    assert order == [f"a {i}" for i in range(20)]


@settings(deadline=None)
@given(
    seats=st.sampled_from([1, 2, 16]),
    budget=st.sampled_from([16, 32, 256]),
    requests=st.lists(
        st.tuples(
            st.sampled_from([("a", 1.0), ("b", 0.1), ("c", 10.0), ("d", 1.0)]),
            st.integers(1, 120),
            st.integers(1, 80),
            st.sampled_from([0.0, 0.0, 3.0, 40.0]),
        ),
        min_size=1,
        max_size=60,
    ),
)
def test_everyone_comes_to_an_end_whatever_the_others_do(
    seats: int, budget: int, requests: list[tuple[tuple[str, float], int, int, float]]
) -> None:
    """With few seats and blocks for hardly more than the longest, so that many are preempted."""
    simulation = Simulation(seats=seats, budget=budget, blocks=14)
    time, arrivals = 0.0, []
    for (tenant, weight), prompt, output, pause in requests:
        time += pause
        arrivals.append((time, tenant, prompt, output, weight))
    work = sum(prompt + output for _, prompt, output, _ in requests)
    simulation.run(arrivals, time + 50.0 * work + 100)
    assert len(simulation.first_token) == len(requests)
    assert not simulation.scheduler.running
    assert not len(simulation.scheduler.waiting)
    assert simulation.scheduler.block_manager.num_free_blocks == 14


def crowd(
    tenants: int, size: tuple[int, int], until: int
) -> list[tuple[float, str, int, int, float]]:
    """Tenants who always have more small requests queued than can run."""
    return [(0.4 * i, f"small{i % tenants}", *size, 1.0) for i in range(int(until / 0.4))]


def test_a_prompt_larger_than_its_tenants_share_of_the_blocks_is_served() -> None:
    """54 of 100 blocks, of which each of two tenants has 50: the other's requests, each of which
    takes what the last one has left, would keep it out for ever."""
    simulation = Simulation(blocks=100)
    arrivals = [*crowd(1, (150, 40), 4000), (50.0, "big", 54 * BLOCK - 1, 4, 1.0)]
    simulation.run(sorted(arrivals), 4000)
    assert simulation.first_token[next(n for n in simulation.started if "big" in n)] < 800
    assert len(simulation.first_token) > 500, "the others are served meanwhile"


@settings(deadline=None)
@given(
    tenants=st.integers(1, 4),
    size=st.tuples(st.integers(1, 200), st.integers(1, 60)),
    blocks=st.integers(1, 60),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    seats=st.sampled_from([4, 16]),
)
def test_what_passes_a_waiting_request_is_bounded_by_the_work_ahead_of_it(
    tenants: int, size: tuple[int, int], blocks: int, weight: float, seats: int
) -> None:
    """Whatever part of the cache it needs, up to all of it, and however many others want it."""
    prompt = blocks * BLOCK - 1
    simulation = Simulation(seats=seats, budget=64, blocks=60)
    arrivals = crowd(tenants, size, 6000)
    simulation.run([each for each in arrivals if each[0] <= 300], 300)
    before = simulation.served.copy()
    simulation.run([(300.0, "big", prompt, 1, weight)], simulation.now + 1e-6)
    name = next(name for name in simulation.started if "big" in name)
    simulation.run([a for a in arrivals if a[0] > 300], 6000, until_first_token_of=name)
    assert name in simulation.first_token
    passed = sum((simulation.served - before).values()) - prompt
    # Its share's worth for each other tenant, then the overtakings, then what runs until it ends.
    fair = tenants * (prompt + 2 * simulation.budget) / weight
    assert passed <= fair + (32 + 2 * seats) * sum(size)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ParameterError, match="expected above 0 and finite"):
        Request("r", (1,), SamplingParams(), weight=weight)


def test_of_a_tenants_waiting_requests_the_lowest_priority_begins_first() -> None:
    queue = FairQueue(credit=0)

    def waiting(name: str, priority: int, tenant: str = "a") -> Sequence:
        request = Request(name, (1,), SamplingParams(), tenant=tenant, priority=priority)
        sequence = Sequence(request, 1, None, None)  # type: ignore[arg-type]
        queue.push(sequence)
        return sequence

    for name, priority in (("1", 0), ("2", 5), ("3", -1), ("4", 0), ("5", 5), ("6", 0)):
        waiting(name, priority)
    waiting("7", 0, tenant="b")
    assert [each.request_id for each in queue.of("a")] == ["3", "1", "4", "6", "2", "5"]
    assert [each.request_id for each in queue.of("b")] == ["7"]
    preempted = queue.of("a")[4]
    queue.remove(preempted)
    queue.push(preempted, front=True)  # what was begun is finished first
    assert [each.request_id for each in queue.of("a")] == ["2", "3", "1", "4", "6", "5"]


def test_a_prefix_is_shared_by_those_with_the_same_salt() -> None:
    blocks = BlockManager(16, 4)
    scheduler = Scheduler(blocks, 8, 64)

    def cached(name: str, salt: str) -> int | None:
        request = Request(name, tuple(range(9)), SamplingParams(), cache_salt=salt)
        sequence = Sequence(request, 1, None, None)  # type: ignore[arg-type]
        scheduler.add(sequence)
        for item in scheduler.schedule():
            scheduler.computed(item)
        scheduler.finish(sequence)
        return sequence.num_cached_tokens

    assert [cached("1", ""), cached("2", ""), cached("3", "x"), cached("4", "y")] == [0, 8, 0, 0]
    assert [cached("5", "x"), cached("6", "y"), cached("7", "")] == [8, 8, 8]
