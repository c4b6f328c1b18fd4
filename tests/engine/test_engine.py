"""The engine gives every request the output it would have had alone, and loses nothing."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import (
    Engine,
    EngineConfig,
    EngineOverloadedError,
    EngineStoppedError,
    GrammarCompiler,
    ParameterError,
    Request,
    RequestOutput,
    SamplingParams,
)
from nybble.loaders import open_checkpoint

CONFIG = EngineConfig(
    dtype=torch.float32,
    block_size=4,
    kv_cache_bytes=1 << 20,
    max_num_seqs=6,
    max_batched_tokens=16,
    max_model_len=64,
)


def start(checkpoint: object, **settings: object) -> Engine:
    from dataclasses import replace

    engine = Engine.load(checkpoint, replace(CONFIG, **settings), progress=False)  # type: ignore[arg-type]
    engine.start()
    return engine


@pytest.fixture(scope="module", params=["all tokens seen", "sliding window"])
def engine(
    plain_checkpoint: Callable[..., object], request: pytest.FixtureRequest
) -> Iterator[Engine]:
    # Room for about 100 tokens, so that six sequences must preempt one another; for less where
    # sequences keep less.
    checkpoint, blocks = plain_checkpoint(), 25
    if request.param == "sliding window":
        checkpoint, blocks = plain_checkpoint(family="mistral", sliding_window=10), 12
    engine = start(checkpoint, kv_cache_bytes=_bytes_for_blocks(checkpoint, blocks))
    yield engine
    engine.stop()


def _bytes_for_blocks(checkpoint: object, blocks: int) -> int:
    from nybble.engine.kv_cache import KVCacheLayout
    from nybble.models import architecture_of

    shape = architecture_of(checkpoint.config)  # type: ignore[attr-defined]
    return blocks * KVCacheLayout.of(shape, CONFIG, 512).block_bytes


async def collect(engine: Engine, request: Request) -> list[RequestOutput]:
    return [output async for output in engine.generate(request)]


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **options)  # type: ignore[arg-type]


def prompt(seed: int, length: int, vocab: int = 200) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())


async def idle(engine: Engine) -> None:
    """Wait until the engine has settled every message."""
    for _ in range(500):
        stats = engine.stats()
        if not stats.running and not stats.waiting:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the engine did not become idle: {engine.stats()}")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_tokens_equal_those_of_transformers(
    plain_checkpoint: Callable[..., object], family: str
) -> None:
    checkpoint = plain_checkpoint(family=family)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)  # type: ignore[attr-defined]
    engine = start(checkpoint)
    try:
        for seed in range(3):
            ids = prompt(seed, 7 + 9 * seed)
            expected = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                min_new_tokens=32,
                max_new_tokens=32,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
            found = tokens(asyncio.run(collect(engine, Request("r", ids, greedy(32)))))
            assert found == expected
    finally:
        engine.stop()


arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # prompt: few different ones, so that prefixes are shared
        st.integers(1, 40),  # prompt length
        st.integers(1, 20),  # tokens to generate
        st.integers(0, 8),  # milliseconds to wait before arriving
        st.one_of(st.none(), st.integers(0, 10)),  # outputs after which the caller goes away
        st.sampled_from("abc"),  # tenant
    ),
    min_size=1,
    max_size=8,
)


@given(arrivals)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mix_of_requests_gives_each_its_own_output_and_leaks_no_block(
    engine: Engine, requests: list[tuple[int, int, int, int, int | None, str]]
) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}

    async def mixed() -> list[list[int]]:
        async def one(index: int) -> list[int]:
            seed, length, count, delay, leaves_after, tenant = requests[index]
            await asyncio.sleep(delay / 1000)
            found: list[int] = []
            ids, weight = prompt(seed, length), weights[tenant]
            stream = engine.generate(
                Request(f"{index}", ids, greedy(count), tenant=tenant, weight=weight)
            )
            async for output in stream:
                found += output.token_ids
                if leaves_after is not None and len(found) > leaves_after:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
            return found

        found = await asyncio.gather(*(one(index) for index in range(len(requests))))
        await idle(engine)
        return found

    async def alone() -> list[list[int]]:
        return [
            tokens(await collect(engine, Request(f"{i}", prompt(seed, length), greedy(count))))
            for i, (seed, length, count, *_) in enumerate(requests)
        ]

    found, expected = asyncio.run(mixed()), asyncio.run(alone())
    for index, (part, whole) in enumerate(zip(found, expected, strict=True)):
        assert part == whole[: len(part)]
        assert requests[index][4] is not None or part == whole
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_preemption_and_prefix_hits_happened_in_the_mixes_above(engine: Engine) -> None:
    async def crowd() -> None:
        await asyncio.gather(
            *(collect(engine, Request(f"{i}", prompt(9, 8), greedy(40))) for i in range(6))
        )

    asyncio.run(crowd())
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hit_tokens > 0


def test_a_seeded_request_draws_the_same_tokens_in_any_company(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, top_p=0.9, seed=7, ignore_eos=True)

    async def with_company(others: int) -> list[int]:
        noise = [
            collect(engine, Request(f"n{i}", prompt(i, 9), SamplingParams(max_tokens=20)))
            for i in range(others)
        ]
        results = await asyncio.gather(
            collect(engine, Request("seeded", prompt(1, 6), params)), *noise
        )
        return tokens(results[0])

    assert asyncio.run(with_company(0)) == asyncio.run(with_company(4))


def test_decoding_from_captured_batch_sizes_gives_the_same_tokens(
    plain_checkpoint: Callable[..., object], recomputed: type
) -> None:
    captured: list[Any] = []

    def capture(function: Callable[[], torch.Tensor]) -> tuple[object, torch.Tensor]:
        captured.append(recomputed(function))
        return captured[-1], captured[-1].out

    async def crowd(engine: Engine) -> list[list[int]]:
        requests = (Request(f"{i}", prompt(i, 3 + i), greedy(4 + 5 * i)) for i in range(5))
        return [tokens(r) for r in await asyncio.gather(*(collect(engine, q) for q in requests))]

    found = []
    for use_graphs in (False, True):
        engine = Engine.load(plain_checkpoint(), CONFIG, progress=False)  # type: ignore[arg-type]
        if use_graphs:
            engine._runner.capture(capture, progress=False)
        engine.start()
        found.append(asyncio.run(crowd(engine)))
        engine.stop()
    assert found[0] == found[1]
    assert sum(graph.replays > 0 for graph in captured) >= 2


def test_text_written_while_the_next_step_computes_is_the_same_text(
    plain_checkpoint: Callable[..., object],
) -> None:
    options = [{}, {"stop": ("e",)}, {"logprobs": 1}, {"logit_bias": {5: 3.0}}]

    async def crowd(engine: Engine) -> list[list[RequestOutput]]:
        requests = (
            Request(f"{i}", prompt(i, 3 + i), greedy(5 + 3 * i, **options[i % 4])) for i in range(8)
        )
        return list(await asyncio.gather(*(collect(engine, request) for request in requests)))

    found = []
    for overlap in (False, True):
        engine = Engine.load(plain_checkpoint(), CONFIG, progress=False)  # type: ignore[arg-type]
        engine._thread._overlap = overlap
        engine.start()
        outputs = asyncio.run(crowd(engine))
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
        engine.stop()
        found.append(
            [
                [(o.text, o.token_ids, o.finish_reason, o.completion_tokens) for o in each]
                for each in outputs
            ]
        )
    assert found[0] == found[1]


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    ids = prompt(2, 5)
    whole = asyncio.run(collect(engine, Request("a", ids, greedy(30))))
    text = "".join(output.text for output in whole)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = asyncio.run(collect(engine, Request("b", ids, greedy(30, stop=(stop,)))))
    assert "".join(output.text for output in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert whole[-1].finish_reason == "length"


def test_logprobs_report_the_choice_and_its_alternatives(engine: Engine) -> None:
    outputs = asyncio.run(collect(engine, Request("a", prompt(3, 5), greedy(4, logprobs=3))))
    for output in outputs:
        (entry,) = output.logprobs
        assert entry.token_id == output.token_ids[0] == entry.top[0][0]
        assert entry.logprob == entry.top[0][1] <= 0
        assert len(entry.top) == 3


@pytest.mark.parametrize(
    ("ids", "params", "parameter"),
    [
        ((), SamplingParams(), "prompt"),
        ((10**6,), SamplingParams(), "prompt"),
        (prompt(0, 64), SamplingParams(), "prompt"),
        (prompt(0, 60), SamplingParams(max_tokens=5), "max_tokens"),
    ],
)
def test_a_request_that_can_never_fit_is_refused_at_once(
    engine: Engine, ids: tuple[int, ...], params: SamplingParams, parameter: str
) -> None:
    with pytest.raises(ParameterError) as refused:
        asyncio.run(collect(engine, Request("a", ids, params)))
    assert refused.value.parameter == parameter


def test_a_full_queue_turns_requests_away(plain_checkpoint: Callable[..., object]) -> None:
    engine = start(plain_checkpoint(), max_num_seqs=1, max_waiting=1)

    async def flood() -> list[object]:
        return await asyncio.gather(
            *(collect(engine, Request(f"{i}", prompt(i, 4), greedy(4))) for i in range(3)),
            return_exceptions=True,
        )

    try:
        results = asyncio.run(flood())
    finally:
        engine.stop()
    assert [isinstance(result, EngineOverloadedError) for result in results] == [False, False, True]


def test_stopping_fails_what_is_in_flight(plain_checkpoint: Callable[..., object]) -> None:
    engine = start(plain_checkpoint())

    async def stop_midway() -> None:
        async for _ in engine.generate(Request("a", prompt(0, 4), greedy(60))):
            await asyncio.to_thread(engine.stop)

    with pytest.raises(EngineStoppedError):
        asyncio.run(stop_midway())
    assert not engine.healthy


def test_a_failing_step_is_reported_to_every_caller(
    plain_checkpoint: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(plain_checkpoint())

    def fail(batch: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine._runner, "run", fail)
    with pytest.raises(EngineStoppedError, match="out of luck"):
        asyncio.run(collect(engine, Request("a", prompt(0, 4), greedy(3))))
    assert not engine.healthy


def test_rows_of_the_output_layer_that_stand_for_no_token_are_never_drawn(
    plain_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """As many models have, so that their vocabulary has a round size."""
    checkpoint = plain_checkpoint()
    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    known = model.config.vocab_size
    model.resize_token_embeddings(known + 64)
    model.save_pretrained(tmp_path)
    padded = type(checkpoint)(tmp_path, AutoConfig.from_pretrained(tmp_path))
    engine = start(padded)
    try:
        assert engine.vocab_size == known + 64
        bias = dict.fromkeys(range(known, known + 64), 100.0)
        params = [
            SamplingParams(max_tokens=30, logit_bias=bias, temperature=100, seed=1),
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20, logprobs=20),
        ]
        for each in params:
            (*_, last) = outputs = asyncio.run(collect(engine, Request("r", prompt(0, 12), each)))
            assert last.completion_tokens > 0
            assert all(token < known for token in tokens(outputs))
        guide = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
        guided = Request("g", prompt(0, 12), params[0], guide.regex("[ab]{3}"))
        held = asyncio.run(collect(engine, guided))
        assert re.fullmatch("[ab]{3}", "".join(output.text for output in held))
        report, scores = outputs[0].logprobs[0], outputs[0].prompt_logprobs
        assert scores is not None
        assert all(token < known for token, _ in report.top)
        assert (scores.top_ids < known).all()
    finally:
        engine.stop()


def test_a_stop_string_that_names_a_special_token_stops_at_that_token(
    plain_checkpoint: Callable[..., Any],
) -> None:
    """The token has no text that the string could be found in."""
    engine = start(plain_checkpoint())
    try:
        special, token = next(iter(engine.tokenizer.get_added_vocab().items()))
        assert token in engine.tokenizer.all_special_ids
        for stop, count in ((special, 1), ("not " + special, 5)):
            params = greedy(5, stop=(stop,), logit_bias={token: 100.0})
            (*_, last) = outputs = asyncio.run(collect(engine, Request("r", prompt(0, 5), params)))
            assert tokens(outputs) == [token] * count
            assert last.finish_reason == ("stop" if count == 1 else "length")
            assert "".join(output.text for output in outputs) == ""
    finally:
        engine.stop()


def test_tokens_that_only_the_tokenizer_knows_are_never_asked_of_the_model(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As of text models that were cut out of multimodal ones."""
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    engine = start(open_checkpoint(folder), speculate="ngram")
    beyond = engine.tokens.tokenizer.convert_tokens_to_ids("<image>")
    assert beyond == engine.tokens.rows

    async def answered(id: str, params: SamplingParams, **options: Any) -> list[int]:
        return tokens(await collect(engine, Request(id, (5, 6, 7), params, **options)))

    try:
        plain = asyncio.run(answered("plain", greedy(6)))
        params = SamplingParams(max_tokens=6, min_tokens=5, temperature=0, stop=("<image>",))
        assert len(asyncio.run(answered("stop", params))) >= 5
        predicted = (*plain[:2], beyond, beyond, *plain[4:])
        assert asyncio.run(answered("prediction", greedy(6), prediction=predicted)) == plain
    finally:
        engine.stop()
