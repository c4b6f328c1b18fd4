"""Many replicas, simulated: what routing costs in adapter copies, and fairness across replicas.

    python load_tests/simulate.py capacity [--replicas 800 --rate 10000 --adapters 100000 --zipf 1]
    python load_tests/simulate.py fairness

capacity: requests with Zipf-distributed adapters reach replicas at random, to the less busy of two,
or by a consistent hash with bounded loads, as HAProxy does with our configuration
(`hash-type consistent`, `hash-balance-factor 125`: Mirrokni, Thorup, Zadimoghaddam 2018). A replica
computes a request for a fixed time, has slots and host copies of adapters, each the least recently
used out first; an adapter with running requests stays in its slot.

fairness: three replicas with the server's own fair queue (`engine/fair_queue.py`) and two tenants,
one of which floods. The quiet one's requests are spread over all replicas, or all go to one.

A service time is not measured here: take it from `nybble bench` on the machine in question.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import heapq
import itertools
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, quantiles
from typing import Any, cast

import numpy as np

from nybble.engine.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from nybble.engine.sequence import Sequence, VirtualCounter

BALANCE = 1.25  # hash-balance-factor of server/replicas/haproxy.py
POINTS = 64  # of a server on the circle


@dataclass
class Replica:
    """slots, host: adapters, the least recently used first. running: requests by adapter."""

    slot_count: int
    host_count: int
    load: int = 0
    slots: OrderedDict[int, None] = field(default_factory=OrderedDict)
    host: OrderedDict[int, None] = field(default_factory=OrderedDict)
    running: Counter[int] = field(default_factory=Counter)
    requests: int = 0
    fills: int = 0
    reads: int = 0
    without_slot: int = 0

    def begin(self, adapter: int) -> None:
        self.requests += 1
        self.load += 1
        self.running[adapter] += 1
        if adapter in self.slots:
            self.slots.move_to_end(adapter)
            return
        self.fills += 1
        if adapter in self.host:
            self.host.move_to_end(adapter)
        else:
            self.reads += 1
            self.host[adapter] = None
            if len(self.host) > self.host_count:
                self.host.popitem(last=False)
        if len(self.slots) >= self.slot_count:
            free = next((each for each in self.slots if not self.running[each]), None)
            if free is None:
                self.without_slot += 1  # it waits until a slot is free
                return
            del self.slots[free]
        self.slots[adapter] = None

    def end(self, adapter: int) -> None:
        self.load -= 1
        self.running[adapter] -= 1
        if not self.running[adapter]:
            del self.running[adapter]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class BoundedHash:
    """The next server on the circle whose load, with this request, is at most BALANCE · mean."""

    def __init__(self, replicas: list[Replica], clock: Callable[[], int]) -> None:
        """clock: requests in flight at all replicas."""
        self._replicas = replicas
        self._total = clock
        circle = sorted(
            (_hash(f"{server}:{point}"), server)
            for server in range(len(replicas))
            for point in range(POINTS)
        )
        self._points = [point for point, _ in circle]
        self._servers = [server for _, server in circle]

    def __call__(self, adapter: int) -> Replica:
        most = BALANCE * (self._total() + 1) / len(self._replicas)
        start = bisect.bisect(self._points, _hash(str(adapter)))
        for step in range(len(self._points)):
            replica = self._replicas[self._servers[(start + step) % len(self._points)]]
            if replica.load < most:
                return replica
        raise AssertionError("a replica below the mean always exists")


def capacity(arguments: argparse.Namespace) -> None:
    weights = 1 / np.arange(1, arguments.adapters + 1) ** arguments.zipf
    shares = np.cumsum(weights / weights.sum())
    count = int(arguments.rate * arguments.seconds)
    print(
        f"{arguments.rate:g} requests/s of {arguments.service:g} s each, {arguments.adapters:,} "
        f"adapters (Zipf {arguments.zipf:g}), {arguments.replicas} replicas of {arguments.slots} "
        f"slots and {arguments.host} host copies; {arguments.seconds:g} s after as many to warm up"
    )
    print("| routing | fills/s | of requests | reads/s | no slot free | adapters each | load p99 |")
    print("|---|---|---|---|---|---|---|")
    for name in ("random", "two", "hash"):
        rng = random.Random(0)
        numbers = np.random.default_rng(0)
        drawn = np.searchsorted(shares, numbers.random(2 * count)).tolist()
        gaps = numbers.exponential(1 / arguments.rate, 2 * count).tolist()
        replicas = [Replica(arguments.slots, arguments.host) for _ in range(arguments.replicas)]
        ending: list[tuple[float, int, int]] = []
        place = {id(replica): i for i, replica in enumerate(replicas)}
        hashed = BoundedHash(replicas, lambda ending=ending: len(ending))  # type: ignore[misc]

        def spread(adapter: int, rng: random.Random = rng, to: list[Replica] = replicas) -> Replica:
            return to[rng.randrange(len(to))]

        def two(adapter: int, rng: random.Random = rng, to: list[Replica] = replicas) -> Replica:
            one, other = rng.choice(to), rng.choice(to)
            return one if one.load <= other.load else other

        policies: dict[str, Callable[[int], Replica]]
        policies = {"random": spread, "two": two, "hash": hashed}
        choose = policies[name]
        now = 0.0
        seen: list[set[int]] = [set() for _ in replicas]
        for i, (adapter, gap) in enumerate(zip(drawn, gaps, strict=True)):
            now += gap
            while ending and ending[0][0] <= now:
                _, at, ended = heapq.heappop(ending)
                replicas[at].end(ended)
            if i == count:
                for each in replicas:
                    each.requests = each.fills = each.reads = each.without_slot = 0
            replica = choose(adapter)
            replica.begin(adapter)
            if i >= count:
                seen[place[id(replica)]].add(adapter)
            heapq.heappush(ending, (now + arguments.service, place[id(replica)], adapter))
        seconds = arguments.seconds
        fills, reads = (sum(getattr(r, key) for r in replicas) for key in ("fills", "reads"))
        load = quantiles((replica.load for replica in replicas), n=100)[98]
        waiting = sum(replica.without_slot for replica in replicas)
        print(
            f"| {name} | {fills / seconds:,.0f} ({fills / seconds / len(replicas):.2f} each) "
            f"| {fills / count:.1%} | {reads / seconds:,.0f} | {waiting / count:.1%} "
            f"| {mean(map(len, seen)):.0f} | {load:.0f} |",
            flush=True,
        )


@dataclass(eq=False)
class Waiting:
    """What the fair queue needs of a sequence."""

    tenant: str
    weight: float = 1.0
    counter: VirtualCounter = field(default_factory=VirtualCounter)

    @property
    def request(self) -> Any:
        return self

    priority = 0


PROMPT, OUTPUTS, SEATS = 256, (32, 96), 16
STEP, FLOOD, ASKED = 0.02, 64, 16  # seconds; waiting requests of each tenant at a replica


def fairness(_: argparse.Namespace) -> None:
    print("| the quiet tenant's requests go to | its tokens | the flooding one's | its share |")
    print("|---|---|---|---|")
    for name, places in (("all replicas in turn", (0, 1, 2)), ("one replica", (0,))):
        served = _flooded(places, seconds=300)
        quiet, flood = served["quiet"], served["flood"]
        print(f"| {name} | {quiet:,} | {flood:,} | {quiet / (quiet + flood):.0%} |")


def _flooded(places: tuple[int, ...], seconds: float) -> Counter[str]:
    """Three replicas, each with FLOOD waiting requests of one tenant; the other asks for more than
    it gets, at these replicas."""
    queues = [FairQueue(credit=1000) for _ in range(3)]
    running: list[list[list[Any]]] = [[] for _ in queues]
    served: Counter[str] = Counter()
    turn, rng = itertools.cycle(places), random.Random(0)
    for _ in range(int(seconds / STEP)):
        queued = {i: Counter(each.tenant for each in queue) for i, queue in enumerate(queues)}
        for i, queue in enumerate(queues):
            for _ in range(FLOOD - queued[i]["flood"]):
                queue.push(cast(Sequence, Waiting("flood")))
        for _ in range(ASKED * len(places) - sum(queued[i]["quiet"] for i in places)):
            queues[next(turn)].push(cast(Sequence, Waiting("quiet")))
        for queue, batch in zip(queues, running, strict=True):
            while len(batch) < SEATS:
                heads = [cast(Waiting, queue.of(tenant)[0]) for tenant in queue.tenants]
                if not heads:
                    break
                best = min(heads, key=lambda head: head.counter.value + PROMPT * PROMPT_COST)
                queue.remove(cast(Sequence, best))
                best.counter.value += PROMPT * PROMPT_COST / best.weight
                batch.append([best, rng.randint(*OUTPUTS)])
            for sequence in batch:
                sequence[0].counter.value += OUTPUT_COST / sequence[0].weight
                served[sequence[0].tenant] += 1
                sequence[1] -= 1
            batch[:] = [sequence for sequence in batch if sequence[1]]
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("capacity")
    one.add_argument("--replicas", type=int, default=800)
    one.add_argument("--rate", type=float, default=10_000)
    one.add_argument("--adapters", type=int, default=100_000)
    one.add_argument("--zipf", type=float, default=1.0)
    one.add_argument("--slots", type=int, default=64)
    one.add_argument("--host", type=int, default=128, help="host copies of a replica")
    one.add_argument("--service", type=float, default=6.5, help="seconds of a request")
    one.add_argument("--seconds", type=float, default=30)
    one.set_defaults(run=capacity)
    commands.add_parser("fairness").set_defaults(run=fairness)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
