"""Many replicas, simulated: what routing costs in adapter copies, and fairness across replicas.

    python load_tests/simulate.py capacity [--replicas 800 --rate 10000 --adapters 100000 --zipf 1]
    python load_tests/simulate.py capacity --haproxy --replicas 16 --rate 100 --adapters 2000
    python load_tests/simulate.py capacity --calibration demo.json --replicas 16 --rate 40 --host 64
    python load_tests/simulate.py fairness

capacity: requests with Zipf-distributed adapters reach replicas at random, to the less busy of two,
or by a consistent hash with bounded loads, as HAProxy does with our configuration
(`hash-type consistent`, `hash-balance-factor 125`: Mirrokni, Thorup, Zadimoghaddam 2018). A replica
has slots and host copies of adapters, each the least recently used out first; an adapter with
running requests stays in its slot. It computes each request for a fixed time, --service, which is
an assumption; or, with --calibration, as fast as a server that `calibrate.py` has measured: a step
takes as long as one of that server with as many sequences, the prompts of the requests in flight
are computed beside, and a request first waits for its adapter to be filled and read. All requests
in flight are computed at once: a fleet that is too small shows as times that grow.

With --haproxy, HAProxy itself is asked as well, with the configuration of `nybble replicas`: each
request is sent to it, and stays open at the server it chose until its simulated end. That is right
for about a thousand requests in flight (rate · service), which shows that the model of its hash
gives the same numbers; the model then answers for whole fleets.

fairness: three replicas with the server's own fair queue (`engine/fair_queue.py`) and two tenants,
one of which floods. The quiet one's requests are spread over all replicas, or all go to one.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import hashlib
import heapq
import itertools
import json
import math
import random
import socket
import subprocess
import tempfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, Self, cast

import numpy as np

from nybble.engine.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from nybble.engine.sequence import Sequence, VirtualCounter
from nybble.server.replicas.haproxy import configuration
from nybble.server.replicas.supervise import find_haproxy

BALANCE = 1.25  # hash-balance-factor of server/replicas/haproxy.py
POINTS = 16  # of a server on the circle: of HAProxy's of weight 1 (BE_WEIGHT_SCALE)


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


class HAProxy:
    """HAProxy itself, before servers which answer a request when the simulation ends it."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._replicas = replicas
        self._loop = asyncio.new_event_loop()
        self._arrived: asyncio.Queue[int] = asyncio.Queue()
        # Of the requests of an adapter at a server, what lets each answer, and each client.
        self._open: defaultdict[tuple[int, int], list[tuple[asyncio.Event, asyncio.Task[bytes]]]]
        self._open = defaultdict(list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raises FileNotFoundError if it is not installed."""
        haproxy = find_haproxy()
        with tempfile.TemporaryDirectory(prefix="nybble-") as folder:
            with socket.create_server(("127.0.0.1", 0)) as sock:
                self._port = sock.getsockname()[1]
            addresses = [self._loop.run_until_complete(self._server(i)) for i in self._numbers()]
            file = Path(folder) / "haproxy.cfg"
            file.write_text(configuration(f"127.0.0.1:{self._port}", addresses))
            process = subprocess.Popen([haproxy, "-db", "-f", str(file)])
            try:
                self._loop.run_until_complete(self._ready(process))
                yield
                for at, adapter in list(self._open):
                    while self._open[at, adapter]:
                        self.end(at, adapter)
            finally:
                process.kill()
                process.wait()

    def __call__(self, adapter: int) -> Replica:
        return self._replicas[self._loop.run_until_complete(self._begin(adapter))]

    def end(self, at: int, adapter: int) -> None:
        """Let a request of this adapter at this server end."""
        answered, client = self._open[at, adapter].pop()
        answered.set()
        answer = self._loop.run_until_complete(client)
        assert b" 200 " in answer.partition(b"\r\n")[0], answer

    def _numbers(self) -> range:
        return range(len(self._replicas))

    async def _server(self, number: int) -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readline()
            if not head.startswith(b"GET /health"):
                self._answered = asyncio.Event()
                self._arrived.put_nowait(number)
                await self._answered.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _ready(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            try:
                if b" 200 " in await self._ask("GET /health", ""):
                    return
            except OSError:
                await asyncio.sleep(0.05)
        raise RuntimeError("haproxy has ended")

    async def _begin(self, adapter: int) -> int:
        body = json.dumps({"model": f"adapter-{adapter}"})
        client = asyncio.ensure_future(self._ask("POST /v1/completions", body))
        at = await self._arrived.get()
        self._open[at, adapter].append((self._answered, client))
        return at

    async def _ask(self, what: str, body: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{what} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
        answer = await reader.read()
        writer.close()
        return answer


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate.py`` measured of one server.

    step_seconds: of a decode step, by its sequences; in between and beyond by straight lines, with
        fewer than were measured as with the fewest.
    prefill_rate: tokens/s of prompts. fill_seconds: how much later a request begins whose adapter
        has to be copied into a slot; read_seconds: and how much more if it is read first.
    """

    step_seconds: dict[int, float]
    prefill_rate: float
    fill_seconds: float
    read_seconds: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError, and ValueError which says what is wrong with the file."""
        text = path.read_text()
        try:
            found = json.loads(text)
            steps = {int(count): float(took) for count, took in found["step_seconds"].items()}
            others = {key: float(found[key]) for key in ("prefill_rate", *_DELAYS)}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not what calibrate.py writes: {error!r}") from error
        positive = (*steps, *steps.values(), others["prefill_rate"])
        fine = len(steps) > 1 and all(0 < value < math.inf for value in positive)
        if not fine or not all(0 <= others[key] < math.inf for key in _DELAYS):
            raise ValueError(
                f"{path}: expected step_seconds of two numbers of sequences or more and a "
                f"prefill_rate, all above 0, and {' and '.join(_DELAYS)} from 0 on"
            )
        return cls(steps, **others)

    def step(self, sequences: int) -> float:
        """Seconds of a step."""
        known = sorted(self.step_seconds)
        sequences = max(sequences, known[0])
        low, high = next(
            (pair for pair in itertools.pairwise(known) if sequences <= pair[1]), known[-2:]
        )
        first, last = self.step_seconds[low], self.step_seconds[high]
        if sequences > high:
            last = max(first, last)  # no step is negative
        return first + (last - first) * (sequences - low) / (high - low)


_DELAYS = ("fill_seconds", "read_seconds")


@dataclass
class World:
    """What capacity simulates.

    rate: requests/s. zipf: exponent. service: seconds of a request, if there is no calibration.
    prompt, tokens: of a request, if there is one. seconds: counted, after as many to warm up.
    """

    replicas: int = 800
    rate: float = 10_000
    adapters: int = 100_000
    zipf: float = 1.0
    slots: int = 64
    host: int = 128
    service: float = 6.5
    prompt: int = 400
    tokens: int = 64
    seconds: float = 30
    calibration: Calibration | None = None

    @property
    def requests(self) -> int:
        return int(self.rate * self.seconds)

    def request_seconds(self, load: int) -> float:
        """How long a request takes at a replica that always has so many, with its adapter there.

        While it has its tokens, each of the others has its prompt once too.
        """
        if self.calibration is None:
            return self.service
        prompts = load * self.prompt / self.calibration.prefill_rate
        return prompts + self.tokens * self.calibration.step(load)


class Fleet:
    """The replicas at a moment, and when their requests end.

    All requests at a replica come on alike, the faster the fewer they are. took: seconds of each
    that has ended since it was cleared.
    """

    def __init__(self, world: World, ended: Callable[[int, int], None]) -> None:
        """ended: is told the replica and the adapter of each request that ends."""
        self._world = world
        self._ended = ended
        self._times: list[float] = []
        self.replicas = [Replica(world.slots, world.host) for _ in range(world.replicas)]
        self.total = 0
        self.took: list[float] = []
        # Of each replica: how many requests one that was always there would have had, and when that
        # was; the place on this scale at which each ends, with its beginning and its adapter.
        self._places = [(0.0, 0.0)] * world.replicas
        self._ending: list[list[tuple[float, float, int]]] = [[] for _ in self.replicas]
        # When the first of a replica ends; an entry counts if it is its replica's last.
        self._next: list[tuple[float, int, int]] = []
        self._entries = [0] * world.replicas

    def begin(self, at: int, adapter: int, now: float) -> None:
        replica, calibration = self.replicas[at], self._world.calibration
        place, fills, reads = self._place(at, now), replica.fills, replica.reads
        replica.begin(adapter)
        self.total += 1
        wait = 0.0
        if calibration is not None:
            wait = (replica.fills - fills) * calibration.fill_seconds
            wait += (replica.reads - reads) * calibration.read_seconds
        end = place + 1 + wait / self._seconds(replica.load)
        heapq.heappush(self._ending[at], (end, now, adapter))
        self._look(at, place, now)

    def until(self, now: float) -> None:
        """Have what ends until then end."""
        while self._next and self._next[0][0] <= now:
            moment, at, entry = heapq.heappop(self._next)
            if entry != self._entries[at]:
                continue
            place, began, adapter = heapq.heappop(self._ending[at])
            self.replicas[at].end(adapter)
            self.total -= 1
            self.took.append(moment - began)
            self._ended(at, adapter)
            self._look(at, place, moment)

    def _place(self, at: int, now: float) -> float:
        place, then = self._places[at]
        return place + (now - then) / self._seconds(self.replicas[at].load)

    def _look(self, at: int, place: float, now: float) -> None:
        self._places[at] = place, now
        self._entries[at] += 1
        if self._ending[at]:
            left = max(0.0, self._ending[at][0][0] - place)
            moment = now + left * self._seconds(self.replicas[at].load)
            heapq.heappush(self._next, (moment, at, self._entries[at]))

    def _seconds(self, load: int) -> float:
        while len(self._times) <= load:
            self._times.append(self._world.request_seconds(max(1, len(self._times))))
        return self._times[load]


ROUTINGS = ("random", "two", "hash")


def route(world: World, routing: str) -> tuple[Fleet, list[set[int]]]:
    """The replicas at the end, and the adapters each had meanwhile. The same for the same world.

    routing: one of ROUTINGS, or ``haproxy``. Raises FileNotFoundError if that is not installed.
    """
    rng = random.Random(0)
    if routing == "haproxy":
        fleet = Fleet(world, lambda at, adapter: haproxy.end(at, adapter))
        haproxy = HAProxy(fleet.replicas)
        with haproxy.running():
            return fleet, _drive(world, fleet, haproxy)
    fleet = Fleet(world, lambda at, adapter: None)
    replicas = fleet.replicas

    def spread(adapter: int) -> Replica:
        return replicas[rng.randrange(len(replicas))]

    def two(adapter: int) -> Replica:
        one, other = rng.choice(replicas), rng.choice(replicas)
        return one if one.load <= other.load else other

    hashed = BoundedHash(replicas, lambda: fleet.total)
    policies: dict[str, Callable[[int], Replica]]
    policies = {"random": spread, "two": two, "hash": hashed}
    return fleet, _drive(world, fleet, policies[routing])


def arrivals(world: World) -> Iterator[tuple[int, float]]:
    """The adapter of each request, and the seconds since the one before it; the first half of them
    warms up."""
    numbers = np.random.default_rng(0)
    weights = 1 / np.arange(1, world.adapters + 1) ** world.zipf
    shares = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(shares, numbers.random(2 * world.requests)).tolist()
    gaps = numbers.exponential(1 / world.rate, 2 * world.requests).tolist()
    return zip(drawn, gaps, strict=True)


def _drive(world: World, fleet: Fleet, choose: Callable[[int], Replica]) -> list[set[int]]:
    """The adapters each replica had after the time to warm up."""
    place = {id(replica): i for i, replica in enumerate(fleet.replicas)}
    now = 0.0
    seen: list[set[int]] = [set() for _ in fleet.replicas]
    for i, (adapter, gap) in enumerate(arrivals(world)):
        now += gap
        fleet.until(now)
        if i == world.requests:
            fleet.took.clear()
            for each in fleet.replicas:
                each.requests = each.fills = each.reads = each.without_slot = 0
        at = place[id(choose(adapter))]
        if i >= world.requests:
            seen[at].add(adapter)
        fleet.begin(at, adapter, now)
    return seen


def capacity(world: World, routings: Iterable[str] = ROUTINGS) -> None:
    measured = world.calibration is not None
    each = f"{world.service:g} s each"
    if measured:
        each = f"{world.prompt} + {world.tokens} tokens, {world.request_seconds(1):.2g} s alone"
    print(
        f"{world.rate:g} requests/s of {each}, {world.adapters:,} "
        f"adapters (Zipf {world.zipf:g}), {world.replicas} replicas of {world.slots} "
        f"slots and {world.host} host copies; {world.seconds:g} s after as many to warm up"
    )
    columns = ["routing", "fills/s", "of requests", "reads/s", "no slot free", "adapters each"]
    columns += ["load p99", *(["seconds p50", "p99"] if measured else [])]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in routings:
        fleet, seen = route(world, name)
        replicas = fleet.replicas
        fills, reads = (sum(getattr(r, key) for r in replicas) for key in ("fills", "reads"))
        waiting = sum(replica.without_slot for replica in replicas)
        cells = [
            name,
            f"{fills / world.seconds:,.0f} ({fills / world.seconds / len(replicas):.2f} each)",
            f"{fills / world.requests:.1%}",
            f"{reads / world.seconds:,.0f}",
            f"{waiting / world.requests:.1%}",
            f"{mean(map(len, seen)):.0f}",
            f"{quantiles((replica.load for replica in replicas), n=100)[98]:.0f}",
        ]
        if measured:
            took = quantiles(fleet.took, n=100) if len(fleet.took) > 1 else [math.nan] * 99
            cells += [f"{took[49]:.2f}", f"{took[98]:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


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
        ("service", rational, "seconds of a request, if there is no calibration"),
        ("prompt", count, "tokens of a request's prompt, with a calibration"),
        ("tokens", count, "that a request generates, with a calibration"),
        ("seconds", rational, "counted, after as many to warm up"),
    ):
        default = getattr(World, name)
        one.add_argument(f"--{name}", type=read, default=default, help=f"{said} ({default:g})")
    one.add_argument("--calibration", type=Path, help="what calibrate.py has written")
    one.add_argument("--haproxy", action="store_true", help="ask HAProxy itself as well")
    commands.add_parser("fairness")
    given = vars(parser.parse_args(arguments))
    if given.pop("command") == "fairness":
        fairness()
        return
    routings = [*ROUTINGS, "haproxy"] if given.pop("haproxy") else ROUTINGS
    try:
        given["calibration"] = given["calibration"] and Calibration.read(given["calibration"])
    except (OSError, ValueError) as error:
        one.error(str(error))
    world = World(**given)
    if not world.requests:
        one.error(f"--rate {world.rate:g} for --seconds {world.seconds:g} is not one request")
    capacity(world, routings)


if __name__ == "__main__":
    main()
