"""What /metrics says after known traffic."""

from __future__ import annotations

from nybble.engine import Engine
from prometheus_client.parser import text_string_to_metric_families

from .test_errors import COMPLETIONS, Client, run


def test_metrics_count_sequences_tokens_and_times(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": "the fox", "max_tokens": 5, "ignore_eos": True, "n": 2}
        async with client.post(COMPLETIONS, json=body) as response:
            prompt = (await response.json())["usage"]["prompt_tokens"]
        text = await (await client.get("/metrics")).text()
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples["nybble_sequences_finished_total", "length"] == 2
        assert samples["nybble_generation_tokens_total",] == 10
        assert samples["nybble_prefix_cache_query_tokens_total",] == 2 * prompt
        assert samples["nybble_time_to_first_token_seconds_count",] == 2
        assert samples["nybble_request_queue_seconds_count",] == 2
        assert samples["nybble_inter_token_latency_seconds_count",] == 8
        assert samples["nybble_e2e_request_latency_seconds_count",] == 2
        assert samples["nybble_http_requests_total", "POST", COMPLETIONS, "200"] == 1
        assert samples["nybble_kv_cache_usage_ratio",] == 0
        assert samples["nybble_engine_healthy",] == 1

    run(engine, scenario)


def test_every_metric_is_documented_and_prefixed(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        text = await (await client.get("/metrics")).text()
        for family in text_string_to_metric_families(text):
            assert family.name.startswith("nybble_")
            assert family.documentation.endswith((".", "error"))

    run(engine, scenario)
