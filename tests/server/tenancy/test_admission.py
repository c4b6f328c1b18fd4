"""What is let in does not wait too long, and a flood is shed, not the victim of it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nybble.engine import Engine
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.admission import Admission, Capacity, Needs
from nybble.server.tenancy.tenants import Tenant, Tenants, new_key

from ..client import COMPLETIONS, Client, run


def tenant(name: str, weight: float = 1) -> Tenant:
    return Tenant(name=name, keys=("sha256:" + "0" * 64,), weight=weight)


@dataclass
class Simulation:
    """A server that computes ``rate`` tokens a second for tenants in turn, ``seats`` at once.

    Each sequence is one unit of ``tokens``. refused: by tenant and code.
    """

    capacity: Capacity
    rate: float
    now: float = 0.0
    computed: float = 0.0
    waits: dict[str, list[float]] = field(default_factory=dict)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    retry_after: list[int] = field(default_factory=list)

    def run(self, arrivals: list[tuple[float, Tenant, int]]) -> Admission:
        admission = Admission(self.capacity, lambda: int(self.computed), lambda: self.now)
        queues: dict[str, deque[tuple[float, ExitStack, int]]] = {}
        running: list[tuple[float, int, int, ExitStack]] = []
        pending = sorted(arrivals, key=lambda arrival: arrival[0], reverse=True)
        turn: deque[str] = deque()
        held, serial = 0, itertools.count()
        while pending or running or any(queues.values()):
            step = 0.05
            self.now += step
            while pending and pending[-1][0] <= self.now:
                at, who, tokens = pending.pop()
                stack = ExitStack()
                try:
                    stack.enter_context(admission.admit(who, 1, tokens))
                except ApiError as error:
                    self.refused[who.name, error.code or ""] += 1
                    self.retry_after.append(error.retry_after or 0)
                    continue
                if who.name not in queues:
                    turn.append(who.name)
                queues.setdefault(who.name, deque()).append((at, stack, tokens))
            while len(running) < self.capacity.seats and any(queues.values()):
                while not queues[turn[0]]:
                    turn.rotate(-1)
                at, stack, tokens = queues[turn[0]][0]
                if held + tokens > self.capacity.tokens(tokens):
                    break
                queues[turn[0]].popleft()
                name = turn[0]
                turn.rotate(-1)
                self.waits.setdefault(name, []).append(self.now - at)
                held += tokens
                # It ends when as much is computed as it and those before it need.
                heapq.heappush(running, (self.computed + held, next(serial), tokens, stack))
            if running:
                self.computed += self.rate * step
            while running and running[0][0] <= self.computed:
                _, _, tokens, stack = heapq.heappop(running)
                held -= tokens
                stack.close()
        return admission


CAPACITY = Capacity(sequences=10_000, seats=16, tokens=lambda _: 1000, max_wait=10)


def test_waits_stay_near_the_bound_however_much_is_sent() -> None:
    rng = random.Random(0)
    # 40 a second of 100 tokens each, where 1,000 tokens a second can be computed: four times.
    arrivals = [(rng.uniform(0, 120), tenant("a"), 100) for _ in range(4800)]
    simulation = Simulation(CAPACITY, rate=1000)
    simulation.run(arrivals)
    waits = simulation.waits["a"]
    assert set(simulation.refused) == {("a", "queue_too_long")}
    assert max(waits) < 15
    assert statistics.median(waits) > 5  # and the queue is used: what can be served is
    assert len(waits) > 0.9 * 120 * 1000 / 100
    assert all(1 <= seconds <= 600 for seconds in simulation.retry_after)


def test_a_flood_is_shed_and_a_quiet_tenant_is_not() -> None:
    rng = random.Random(0)
    flood = [(rng.uniform(0, 120), tenant("flood"), 100) for _ in range(4800)]
    quiet = [(second, tenant("quiet"), 100) for second in range(5, 120, 5)]
    simulation = Simulation(CAPACITY, rate=1000)
    simulation.run([*flood, *quiet])
    assert set(simulation.refused) == {("flood", "queue_too_long")}
    assert len(simulation.waits["quiet"]) == len(quiet)
    assert max(simulation.waits["quiet"]) < 3 < statistics.median(simulation.waits["flood"])


def test_a_burst_that_fits_at_once_is_let_in_however_slow_the_server_was() -> None:
    now = computed = 0.0
    admission = Admission(CAPACITY, lambda: int(computed), lambda: now)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(admission.admit(None, 1, 100))
        now, computed = 100.0, 10.0  # a tenth of a token a second, with a queue
    assert admission.rate == pytest.approx(0.1)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(admission.admit(None, 1, 100))
        assert admission.predicted_wait == 0
        with pytest.raises(ApiError) as refused, admission.admit(None, 1, 100):
            pass
        assert (refused.value.status, refused.value.code) == (429, "queue_too_long")
        assert refused.value.retry_after == 600  # 990 s, but who would wait for that
    with admission.admit(None, 1, 1e6):  # as after a reply to all: nothing is ahead of it
        pass


def test_sequences_longer_than_what_is_kept_of_them_fit_in_greater_number() -> None:
    """1,000 tokens of cache hold ten sequences of which 100 tokens are kept, whatever they have."""
    now = computed = 0.0
    capacity = Capacity(100, 16, tokens=lambda mean: 1000 * max(1, mean / 100), max_wait=10)
    admission = Admission(capacity, lambda: int(computed), lambda: now)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(admission.admit(None, 1, 400))
        now, computed = 10.0, 5000.0
        for _ in range(5):
            stack.enter_context(admission.admit(None, 1, 400))
        assert admission.rate is None, "nothing has waited so far"
        now, computed = 20.0, 6000.0  # 100 tokens a second; 2,000 wait, and the newcomer's 400
        with pytest.raises(ApiError) as refused, admission.admit(None, 1, 400):
            pass
        assert "would wait about 24 s" in refused.value.message
        assert admission.rate == 100


def test_shares_of_the_rate_go_by_weight() -> None:
    now = computed = 0.0
    admission = Admission(CAPACITY, lambda: int(computed), lambda: now)
    with ExitStack() as stack:
        for name in ("light", "heavy"):
            for _ in range(10):
                stack.enter_context(
                    admission.admit(tenant(name, 3 if name == "heavy" else 1), 1, 100)
                )
        now, computed = 10.0, 1000.0  # 100 tokens a second
        # 1,000 are queued for each. The light has a quarter of cache and rate: 750 / 25 = 30 s.
        with pytest.raises(ApiError) as refused, admission.admit(tenant("light"), 1, 0):
            pass
        assert "would wait about 30 s" in refused.value.message
        assert refused.value.retry_after == 20  # when it is down to 10
        with admission.admit(tenant("heavy", 3), 1, 0):  # (1000 - 750) / 75
            pass


def test_expected_outputs_learn_from_what_ends_by_itself_and_at_limits() -> None:
    needs = Needs()
    assert needs.of_output(1) == pytest.approx(1, rel=0.01)
    assert needs.of_output(0) == 0
    rng = random.Random(0)
    for _ in range(5000):
        # Many are cut off at 5; the others would have 400 in the mean.
        limit = 5 if rng.random() < 0.9 else 4000
        length = rng.expovariate(1 / 400)
        needs.add(100, 75, round(min(length, limit)), ended=length < limit)
    assert needs.of_output(100_000) == pytest.approx(400, rel=0.5)
    assert needs.of_output(5) == pytest.approx(5, rel=0.05)
    assert needs.of_prompt(1000) == pytest.approx(250)
    for _ in range(2000):
        needs.add(100, 0, 50, ended=False)  # nothing but limits: a benchmark
    assert needs.of_output(50) == pytest.approx(50, rel=0.05)


def test_a_live_server_sheds_a_flood_by_cause_and_serves_the_quiet_tenant(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (time.sleep(0.01), compute(batch))[1])
    monkeypatch.setattr(engine, "_max_in_flight", 1000)
    keys = {name: new_key() for name in ("flood", "quiet")}
    path = tmp_path / "tenants.toml"
    path.write_text("".join(f'[tenants.{n}]\nkeys = ["{key[1]}"]\n' for n, key in keys.items()))

    async def ask(client: Client, name: str, index: int) -> str | None:
        """The code with which it was refused; None if it was served."""
        body = {"model": "tiny", "prompt": f"{index} a", "max_tokens": 40, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {keys[name][0]}"}
        async with client.post(COMPLETIONS, json=body, headers=headers) as response:
            after = response.headers.get("Retry-After")
            answer = await response.json()
        assert (response.status == 200) or (response.status == 429 and int(after or 0) >= 1), answer
        return None if response.status == 200 else str(answer["error"]["code"])

    async def scenario(client: Client) -> None:
        codes: Counter[str | None] = Counter()
        quiet: list[str | None] = []
        over = asyncio.Event()

        async def one_after_another(index: int) -> None:
            while not over.is_set():
                codes[await ask(client, "flood", index)] += 1
                await asyncio.sleep(0.05)

        flooding = [asyncio.create_task(one_after_another(index)) for index in range(60)]
        while len(quiet) < 3 or not codes["queue_too_long"] or not codes[None]:
            quiet.append(await ask(client, "quiet", 0))
        over.set()
        await asyncio.gather(*flooding)
        assert set(codes) == {"queue_too_long", None}
        assert set(quiet) == {None}
        text = await (await client.get("/metrics")).text()
        shed = f'nybble_request_errors_total{{cause="queue_too_long"}} {codes["queue_too_long"]}.0'
        assert shed in text
        assert "nybble_predicted_wait_seconds 0.0" in text  # nothing is in flight any more

    run(engine, scenario, max_sequences=1000, max_queue_seconds=0.5, tenants=Tenants(path))


def test_more_than_the_whole_cache_holds_is_refused_and_what_just_fits_is_served(
    tiny_model: Callable[..., Path],
) -> None:
    from dataclasses import replace

    from nybble.loaders import open_checkpoint

    from ..conftest import CONFIG

    checkpoint = open_checkpoint(tiny_model())
    # 8 blocks of 16 tokens; the model itself could take 512.
    small = replace(CONFIG, kv_cache_bytes=8 * 16 * 2 * 2 * 2 * 32 * 4)
    engine = Engine.load(checkpoint, small, progress=False)
    assert engine.kv_cache_tokens(64) == engine.max_model_len == 128
    engine.start()

    async def scenario(client: Client) -> None:
        for length, most, status in ((100, 28, 200), (100, 29, 400), (128, 1, 400), (127, 1, 200)):
            body = {"model": "tiny", "prompt": [7] * length, "max_tokens": most}
            async with client.post(COMPLETIONS, json=body) as response:
                answer = await response.json()
                assert response.status == status, (length, most, answer)
            if status == 400:
                assert answer["error"]["code"] == "context_length_exceeded"
                assert "limited to 128" in answer["error"]["message"]

    run(engine, scenario)
    engine.stop()
