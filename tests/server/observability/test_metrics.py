"""What /metrics says after known traffic."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError
from prometheus_client.parser import text_string_to_metric_families

from nybble.engine import AdapterConfig, Engine
from nybble.loaders import open_checkpoint
from nybble.server.observability.metrics import _Shares
from nybble.server.tenancy.tenants import Tenants, new_key

from ..client import CHAT, COMPLETIONS, HELLO, Client, refused, run
from ..conftest import CONFIG


async def scrape(client: Client) -> dict[tuple[str, ...], float]:
    text = await (await client.get("/metrics")).text()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_sequences_tokens_and_times(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": "the fox", "max_tokens": 5, "ignore_eos": True, "n": 2}
        async with client.post(COMPLETIONS, json=body) as response:
            prompt = (await response.json())["usage"]["prompt_tokens"]
        samples = await scrape(client)
        assert samples["nybble_sequences_finished_total", "length"] == 2
        assert samples["nybble_generation_tokens_total",] == 10
        assert samples["nybble_prefix_cache_query_tokens_total",] == 2 * prompt
        assert samples["nybble_time_to_first_token_seconds_count",] == 2
        assert samples["nybble_request_queue_seconds_count",] == 2
        assert samples["nybble_inter_token_latency_seconds_count",] == 8
        assert samples["nybble_e2e_request_latency_seconds_count",] == 2
        assert samples["nybble_http_requests_total", "POST", COMPLETIONS, "200"] == 1
        assert samples["nybble_request_prompt_tokens_sum",] == 2 * prompt
        assert samples["nybble_request_generation_tokens_sum",] == 10
        assert samples["nybble_request_max_tokens_sum",] == 10
        assert samples["nybble_request_time_per_output_token_seconds_count",] == 2
        assert samples["nybble_sequences_limit",] == 16
        assert samples["nybble_kv_cache_usage_ratio",] == 0
        assert samples["nybble_engine_healthy",] == 1

    run(engine, scenario)


def test_every_metric_is_documented_and_prefixed(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        text = await (await client.get("/metrics")).text()
        for family in text_string_to_metric_families(text):
            assert family.name.startswith(("nybble_", "process_"))
            assert family.documentation.endswith(".")

    run(engine, scenario)


def test_the_time_of_a_sequence_is_its_queueing_its_prefill_and_its_decoding(
    engine: Engine,
) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": "the fox", "max_tokens": 5, "ignore_eos": True}
        await client.post(COMPLETIONS, json=body)
        samples = await scrape(client)
        names = ("queue", "prefill", "decode", "inference")
        queue, prefill, decode, inference = (
            samples[f"nybble_request_{name}_seconds_sum",] for name in names
        )
        total = samples["nybble_e2e_request_latency_seconds_sum",]
        assert math.isclose(queue + prefill, samples["nybble_time_to_first_token_seconds_sum",])
        assert math.isclose(queue + prefill + decode, total)
        assert math.isclose(prefill + decode, inference)
        per_token = samples["nybble_request_time_per_output_token_seconds_sum",]
        assert math.isclose(per_token, decode / 4)

    run(engine, scenario)


def test_steps_are_counted_by_their_sequences_and_tokens(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": [7] * 21, "max_tokens": 5, "ignore_eos": True}
        await client.post(COMPLETIONS, json=body)
        samples = await scrape(client)
        assert samples["nybble_engine_steps_total",] == 5
        assert 0 < samples["nybble_engine_step_seconds_total",] < 60
        assert samples["nybble_engine_step_sequences_sum",] == 5
        assert samples["nybble_engine_step_sequences_bucket", "1.0"] == 5
        assert samples["nybble_engine_step_tokens_sum",] == 21 + 4
        assert samples["nybble_engine_step_tokens_bucket", "1.0"] == 4
        assert samples["nybble_engine_step_tokens_bucket", "16.0"] == 4
        assert samples["nybble_engine_step_tokens_bucket", "32.0"] == 5
        assert samples["nybble_engine_step_tokens_count",] == 5

    run(engine, scenario)


def test_errors_are_counted_by_their_cause(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        await refused(client, COMPLETIONS, {"model": "tiny", "prompt": "a", "temperature": -1})
        await refused(client, COMPLETIONS, b"{")
        await refused(client, CHAT, {"model": "other", "messages": HELLO}, status=404)
        await client.get("/nothing")
        await client.delete("/health")
        samples = await scrape(client)
        for cause in (
            *("invalid_value", "invalid_json", "model_not_found", "not_found"),
            "method_not_allowed",
        ):
            assert samples["nybble_request_errors_total", cause] == 1, cause
        assert samples["nybble_http_requests_total", "DELETE", "unknown", "405"] == 1

    run(engine, scenario)


def test_streams_cut_short_count_as_errors_though_their_status_was_200(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
        stream = {**body, "stream": True}
        gone = await client.post(COMPLETIONS, json=stream)
        gone.close()
        async with asyncio.timeout(60):
            while True:
                samples = await scrape(client)
                if ("nybble_request_errors_total", "client_closed") in samples:
                    break
                await asyncio.sleep(0.01)
        assert samples["nybble_sequences_finished_total", "cancelled"] == 1
        async with client.post(COMPLETIONS, json=stream) as response:
            assert await response.content.readline()
            await asyncio.to_thread(engine.stop)
            assert b"engine_unavailable" in await response.read()
        samples = await scrape(client)
        assert samples["nybble_request_errors_total", "engine_unavailable"] == 1
        assert samples["nybble_http_requests_total", "POST", COMPLETIONS, "200"] == 1
        assert samples["nybble_http_requests_total", "POST", COMPLETIONS, "499"] == 1

    run(engine, scenario)


def test_labels_stay_bounded_whatever_clients_send(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """60 adapters of 60 tenants over HTTP, and words of a client's own wherever they fit."""
    keys = [new_key() for _ in range(60)]
    file = tmp_path / "tenants.toml"
    file.write_text(
        "".join(f'[tenants.t{i}]\nkeys = ["{stored}"]\n' for i, (_, stored) in enumerate(keys))
    )
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=4))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    for index in range(60):
        engine.load_adapter(f"a{index}", str(tiny_adapter(seed=1)))

    async def ask(client: Client, index: int) -> None:
        body = {"model": f"a{index}", "prompt": "a", "max_tokens": 2, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {keys[index][0]}"}
        async with client.post(COMPLETIONS, json=body, headers=headers) as response:
            assert response.status == 200

    async def hostile(client: Client, word: str) -> None:
        headers = {"Authorization": f"Bearer {keys[0][0]}", "X-LoRA-Adapter": word}
        bodies: list[dict[str, Any]] = [
            {"model": word, "prompt": "a"},
            {"model": "tiny", "prompt": "a", "adapter": word},
            {"model": "tiny", "prompt": "a", "user": word, word: 1},
            {"model": "tiny", "prompt": "a", "response_format": {"type": word}},
        ]
        for body in bodies:
            await client.post(COMPLETIONS, json=body, headers=headers)
        await client.get(f"/{word}", headers=headers)
        await client.get(f"/v1/models/{word}", headers=headers)
        await client.post(COMPLETIONS, headers={"Authorization": f"Bearer {word}"})
        for name in ("User-Agent", "X-Request-Id", "Origin"):
            await client.get("/v1/models", headers={**headers, name: word})
        with contextlib.suppress(ClientError):
            await client.request(word.upper(), "/v1/models", headers=headers)

    async def scenario(client: Client) -> None:
        for index in range(60):
            await ask(client, index)
        samples = await scrape(client)
        for kind in ("adapter", "tenant"):
            for what, total in (("sequences", 60), ("generation_tokens", 120)):
                name = f"nybble_{kind}_{what}_total"
                found = {key[1]: n for key, n in samples.items() if key[0] == name}
                assert len(found) == 51
                assert found["other"] == 10 * total / 60
                assert sum(found.values()) == total
        await hostile(client, "wordone")
        before = await scrape(client)
        for word in ("wordtwo", "wordthree"):
            await hostile(client, word)
        after = await scrape(client)
        assert after.keys() == before.keys()
        assert "word" not in "".join(itertools.chain.from_iterable(after)).lower()

    try:
        run(engine, scenario, tenants=Tenants(file))
    finally:
        engine.stop()


def test_the_busiest_have_the_labels_and_what_was_counted_goes_on() -> None:
    now = 0.0
    shares = _Shares("adapter", lambda: now)

    def samples() -> dict[str, float]:
        """Of the number of sequences, by adapter."""
        sequences, *_ = shares.families
        (family,) = text_string_to_metric_families("".join(sequences.write()))
        return {sample.labels["adapter"]: sample.value for sample in family.samples}

    def count(name: str) -> float | None:
        return samples().get(name)

    for index in range(60):
        shares.begin(f"a{index}")
    shares.begin("a0")
    for _ in range(3):
        shares.begin("a59")
    shares.generated("a1", 7)
    assert (count("a1"), count("a59"), count("other")) == (1, None, 13)
    now = 601.0
    shares.begin("a59")
    shares.begin("a58")
    assert (count("a59"), count("other"), count("a0")) == (1, 14, 2)
    # One label has changed hands: three requests more are not enough for another's of two.
    assert sum(count(f"a{index}") is None for index in range(50)) == 1
    shares.generated("a1", 7)
    assert len(samples()) <= 51


def test_drafts_are_counted_by_tenant_and_end_with_its_label() -> None:
    now = 0.0
    shares = _Shares("tenant", lambda: now, method="ngram")

    def samples() -> dict[tuple[str, str], float]:
        text = "".join(itertools.chain.from_iterable(each.write() for each in shares.families))
        return {
            (sample.name, sample.labels["tenant"]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels and (sample.labels.get("method") == "ngram")
        }

    for index in range(50):
        shares.begin(f"t{index}")
    shares.drafted("t0", 8, 3)
    shares.drafted("t0", 4, 0)
    shares.drafted("new", 5, 5)
    shares.drafted("", 5, 5)
    assert samples() == {
        ("nybble_tenant_draft_tokens_total", "t0"): 12,
        ("nybble_tenant_draft_tokens_total", "other"): 5,
        ("nybble_tenant_accepted_draft_tokens_total", "t0"): 3,
        ("nybble_tenant_accepted_draft_tokens_total", "other"): 5,
        ("nybble_tenant_draft_accepted_length_count", "t0"): 2,
        ("nybble_tenant_draft_accepted_length_sum", "t0"): 5,
        ("nybble_tenant_draft_accepted_length_count", "other"): 1,
        ("nybble_tenant_draft_accepted_length_sum", "other"): 6,
    }
    # Fifty busier tenants take the labels over.
    for index in range(50):
        for _ in range(3):
            shares.begin(f"u{index}")
    now = 601.0
    shares.begin("u0")
    assert {tenant for _, tenant in samples()} == {"other"}


def test_vllms_names_say_what_an_endpoint_picker_asks_for(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """The names and labels of the Gateway API inference extension's model server protocol."""
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=4))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    for index in range(3):
        engine.load_adapter(f"a{index}", str(tiny_adapter(seed=index)))

    async def labels_of_adapters(client: Client) -> dict[str, str]:
        text = await (await client.get("/metrics")).text()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        (sample,) = families["vllm:lora_requests_info"].samples
        assert abs(sample.value - time.time()) < 60
        return sample.labels

    async def scenario(client: Client) -> None:
        before = await labels_of_adapters(client)
        assert before == {
            "max_lora": "2",
            "running_lora_adapters": "",
            "waiting_lora_adapters": "",
        }
        for name in ("a2", "a0"):
            body = {"model": name, "prompt": "a", "max_tokens": 2}
            assert (await client.post(COMPLETIONS, json=body)).status == 200
        after = await labels_of_adapters(client)
        assert set(after["running_lora_adapters"].split(",")) == {"a0", "a2"}
        samples = await scrape(client)
        assert samples["nybble_adapters", "device"] == 2
        for theirs, ours in (
            ("num_requests_running", "sequences_running"),
            ("num_requests_waiting", "sequences_waiting"),
            ("kv_cache_usage_perc", "kv_cache_usage_ratio"),
        ):
            assert samples[f"vllm:{theirs}", "tiny"] == samples[f"nybble_{ours}",]
        sizes = [
            str(int(samples[f"nybble_kv_cache_{name}",])) for name in ("block_tokens", "blocks")
        ]
        assert samples["vllm:cache_config_info", *sizes] == 1
        assert sizes[0] == str(CONFIG.block_size)
        models = await (await client.get("/v1/models")).json()
        parents = {model["id"]: model["parent"] for model in models["data"]}
        assert parents == {"tiny": None, "a0": "tiny", "a1": "tiny", "a2": "tiny"}

    try:
        run(engine, scenario, vllm_metrics=True)
    finally:
        engine.stop()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_own_reader_takes_every_line(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """It is the endpoint picker's too, which gets nothing if one line is wrong."""
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=4))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    engine.load_adapter("org/a:1.0", str(tiny_adapter(seed=1)))

    async def scenario(client: Client) -> None:
        body = {"model": "org/a:1.0", "prompt": "a", "max_tokens": 2}
        assert (await client.post(COMPLETIONS, json=body)).status == 200
        text = await (await client.get("/metrics")).text()
        assert 'running_lora_adapters="org/a:1.0"' in text
        for what, taken in ((text, True), (text.replace("} 1.0\n", "} 1.0 no\n"), False)):
            command = ["promtool", "check", "metrics"]
            told = subprocess.run(command, input=what, capture_output=True, text=True)
            assert ("error while linting" not in told.stderr) == taken, told.stderr

    try:
        run(engine, scenario, vllm_metrics=True)
    finally:
        engine.stop()


def test_adapters_that_requests_wait_for_are_named(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """The engine's thread is not running, so that nothing gets out of the queue."""
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=4))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.load_adapter("poet", str(tiny_adapter(seed=1)))
    registry = engine._require_adapters()
    version = registry._versions["poet"]
    registry.cache.queue(version, "tenant")
    usage = engine.adapter_usage()
    assert (usage.slots, usage.waiting, usage.in_slots) == (2, ("poet",), ())
    assert usage.device + usage.host + usage.disk == 1


def test_without_the_flag_or_adapters_there_is_no_name_of_vllms(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        text = await (await client.get("/metrics")).text()
        assert "vllm:" not in text

    async def flagged(client: Client) -> None:
        text = await (await client.get("/metrics")).text()
        assert "vllm:num_requests_running" in text
        assert "vllm:lora_requests_info" not in text

    run(engine, scenario)
    run(engine, flagged, vllm_metrics=True)
