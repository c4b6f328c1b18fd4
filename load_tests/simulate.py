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
import math
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


@dataclass
class World:
    """What capacity simulates.

    rate: requests/s. zipf: exponent. service: seconds of a request. seconds: counted, after as many
    to warm up.
    """

    replicas: int = 800
    rate: float = 10_000
    adapters: int = 100_000
    zipf: float = 1.0
    slots: int = 64
    host: int = 128
    service: float = 6.5
    seconds: float = 30

    @property
    def requests(self) -> int:
        return int(self.rate * self.seconds)


ROUTINGS = ("random", "two", "hash")


def route(world: World, routing: str) -> tuple[list[Replica], list[set[int]]]:
    """The replicas at the end, and the adapters each had meanwhile. The same for the same world.

    routing: one of ROUTINGS.
    """
    rng, numbers = random.Random(0), np.random.default_rng(0)
    weights = 1 / np.arange(1, world.adapters + 1) ** world.zipf
    shares = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(shares, numbers.random(2 * world.requests)).tolist()
    gaps = numbers.exponential(1 / world.rate, 2 * world.requests).tolist()
    replicas = [Replica(world.slots, world.host) for _ in range(world.replicas)]
    place = {id(replica): i for i, replica in enumerate(replicas)}
    ending: list[tuple[float, int, int]] = []

    def spread(adapter: int) -> Replica:
        return replicas[rng.randrange(len(replicas))]

    def two(adapter: int) -> Replica:
        one, other = rng.choice(replicas), rng.choice(replicas)
        return one if one.load <= other.load else other

    hashed = BoundedHash(replicas, lambda: len(ending))
    policies: dict[str, Callable[[int], Replica]]
    policies = {"random": spread, "two": two, "hash": hashed}
    choose = policies[routing]
    now = 0.0
    seen: list[set[int]] = [set() for _ in replicas]
    for i, (adapter, gap) in enumerate(zip(drawn, gaps, strict=True)):
        now += gap
        while ending and ending[0][0] <= now:
            _, at, ended = heapq.heappop(ending)
            replicas[at].end(ended)
        if i == world.requests:
            for each in replicas:
                each.requests = each.fills = each.reads = each.without_slot = 0
        replica = choose(adapter)
        replica.begin(adapter)
        if i >= world.requests:
            seen[place[id(replica)]].add(adapter)
        heapq.heappush(ending, (now + world.service, place[id(replica)], adapter))
    return replicas, seen


def capacity(world: World) -> None:
    print(
        f"{world.rate:g} requests/s of {world.service:g} s each, {world.adapters:,} "
        f"adapters (Zipf {world.zipf:g}), {world.replicas} replicas of {world.slots} "
        f"slots and {world.host} host copies; {world.seconds:g} s after as many to warm up"
    )
    print("| routing | fills/s | of requests | reads/s | no slot free | adapters each | load p99 |")
    print("|---|---|---|---|---|---|---|")
    for name in ROUTINGS:
        replicas, seen = route(world, name)
        fills, reads = (sum(getattr(r, key) for r in replicas) for key in ("fills", "reads"))
        load = quantiles((replica.load for replica in replicas), n=100)[98]
        waiting = sum(replica.without_slot for replica in replicas)
        print(
            f"| {name} | {fills / world.seconds:,.0f} "
            f"({fills / world.seconds / len(replicas):.2f} each) "
            f"| {fills / world.requests:.1%} | {reads / world.seconds:,.0f} "
            f"| {waiting / world.requests:.1%} "
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


def fairness() -> None:
    print("| the quiet tenant's requests go to | its tokens | the flooding one's | its share |")
    print("|---|---|---|---|")
    for name, places in (("all replicas in turn", (0, 1, 2)), ("one replica", (0,))):
        served = sum(flooded(places, seconds=300), Counter[str]())
        quiet, flood = served["quiet"], served["flood"]
        print(f"| {name} | {quiet:,} | {flood:,} | {quiet / (quiet + flood):.0%} |")


def flooded(places: tuple[int, ...], seconds: float) -> list[Counter[str]]:
    """Tokens of each tenant at each of three replicas.

    The tenant "flood" has FLOOD waiting requests at each; "quiet" asks for more than it gets, at
    these replicas.
    """
    queues = [FairQueue(credit=1000) for _ in range(3)]
    running: list[list[list[Any]]] = [[] for _ in queues]
    served: list[Counter[str]] = [Counter() for _ in queues]
    turn, rng = itertools.cycle(places), random.Random(0)
    for _ in range(int(seconds / STEP)):
        queued = {i: Counter(each.tenant for each in queue) for i, queue in enumerate(queues)}
        for i, queue in enumerate(queues):
            for _ in range(FLOOD - queued[i]["flood"]):
                queue.push(cast(Sequence, Waiting("flood")))
        for _ in range(ASKED * len(places) - sum(queued[i]["quiet"] for i in places)):
            queues[next(turn)].push(cast(Sequence, Waiting("quiet")))
        for queue, batch, tokens in zip(queues, running, served, strict=True):
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
                tokens[sequence[0].tenant] += 1
                sequence[1] -= 1
            batch[:] = [sequence for sequence in batch if sequence[1]]
    return served


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], Any]:
    """Reads an argument that is a finite number from ``least`` on."""

    def read(text: str) -> int | float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} on")
        return value

    read.__name__ = kind.__name__  # as argparse says what it expected
    return read


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("capacity")
    count, rational = _at_least(1, int), _at_least(1e-3, float)
    # With one replica there is nothing to choose.
    for name, read, said in (
        ("replicas", _at_least(2, int), ""),
        ("rate", rational, "requests/s"),
        ("adapters", count, ""),
        ("zipf", _at_least(0, float), "exponent; 0 if all adapters are asked for alike"),
        ("slots", count, "adapters that a replica computes with at a time"),
        ("host", count, "host copies of a replica"),
        ("service", rational, "seconds of a request"),
        ("seconds", rational, "counted, after as many to warm up"),
    ):
        default = getattr(World, name)
        one.add_argument(f"--{name}", type=read, default=default, help=f"{said} ({default:g})")
    commands.add_parser("fairness")
    given = vars(parser.parse_args(arguments))
    if given.pop("command") == "fairness":
        fairness()
        return
    world = World(**given)
    if not world.requests:
        one.error(f"--rate {world.rate:g} for --seconds {world.seconds:g} is not one request")
    capacity(world)


if __name__ == "__main__":
    main()
