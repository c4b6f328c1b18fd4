"""Requests with adapters get what peft computes, in any company, whatever is loaded meanwhile."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.engine import (
    AdapterConfig,
    AdapterUnavailableError,
    Engine,
    EngineConfig,
    NotANumberError,
    ParameterError,
    Request,
    RequestOutput,
    SamplingParams,
)
from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import AdapterError, open_checkpoint
from nybble.quantizers import quantize_checkpoint

CONFIG = EngineConfig(
    dtype=torch.float32,
    block_size=4,
    kv_cache_bytes=1 << 20,
    max_num_seqs=6,
    max_batched_tokens=24,
    max_model_len=64,
    adapters=AdapterConfig(slots=2, max_rank=8),
)
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Three adapters of different ranks and targets, more than the two slots.
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"seed": 1},
    "rank 8 attention": {"seed": 2, "r": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "patterns": {"seed": 3, "rank_pattern": {"q_proj": 2, "up_proj": 7}, "use_rslora": True},
}


def start(folder: Path, **changes: Any) -> Engine:
    engine = Engine.load(open_checkpoint(folder), replace(CONFIG, **changes), progress=False)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> Iterator[Engine]:
    engine = start(tiny_model())
    for name, options in ADAPTERS.items():
        engine.load_adapter(name, str(tiny_adapter(**options)))
    yield engine
    engine.stop()


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **options)


async def collect(engine: Engine, request: Request) -> list[RequestOutput]:
    return [output async for output in engine.generate(request)]


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def ask(engine: Engine, adapter: str | None, seed: int = 0, count: int = 12) -> list[int]:
    request = Request("r", prompt(seed, 9), greedy(count), adapter=adapter)
    return tokens(asyncio.run(collect(engine, request)))


def quantized(folder: Path, target: Path, kind: str) -> Path:
    """The tiny model in another format; desc_act is a GPTQ checkpoint with its groups shuffled."""
    if kind == "bf16":
        return folder
    format = {"desc_act": "gptq"}.get(kind, kind)
    quantize_checkpoint(folder, target, format=format, group_size=32, progress=False)  # type: ignore[arg-type]
    if kind == "desc_act":
        tensors = load_file(target / "model.safetensors")
        for name in [name for name in tensors if name.endswith("g_idx")]:
            torch.manual_seed(len(tensors[name]))
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]))]
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def dequantized_base(original: Path, folder: Path) -> Any:
    """transformers' float32 model with the weights the checkpoint in ``folder`` stands for."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    state = model.state_dict()
    for name, weight in open_checkpoint(folder).weights():
        if isinstance(weight, torch.Tensor):
            continue
        dense = weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight.float()
        parent, dot, leaf = name.rpartition(".")
        names = [f"{parent}{dot}{part}.weight" for part in PARTS.get(leaf, (leaf,))]
        for part, rows in zip(names, dense.split([len(state[n]) for n in names]), strict=True):
            state[part].copy_(rows)
        assert isinstance(weight, PackedWeight | DenseWeight)
    return model.eval()


@pytest.mark.parametrize("kind", ["bf16", "gptq", "desc_act", "awq", "nf4"])
def test_outputs_equal_those_of_peft_on_the_dequantized_base(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
) -> None:
    """In float32: the same tokens, and log probabilities within 1e-3."""
    from peft import PeftModel

    folder = quantized(tiny_model(), tmp_path / kind, kind)
    base = dequantized_base(tiny_model(), folder)
    changed = 0
    engine = start(folder)
    try:
        for name, options in ADAPTERS.items():
            engine.load_adapter(name, str(tiny_adapter(**options)))
            outputs = asyncio.run(
                collect(engine, Request("r", prompt(5, 11), greedy(10, logprobs=0), adapter=name))
            )
            ids = torch.tensor([prompt(5, 11) + tuple(tokens(outputs))])
            adapted = PeftModel.from_pretrained(base, tiny_adapter(**options))
            with torch.no_grad():
                logprobs = adapted(ids).logits[0].log_softmax(-1)
                changed += bool((adapted(ids).logits - base_logits(adapted, ids)).abs().max() > 1)
            base = adapted.unload()
            for index, output in enumerate(outputs):
                row = logprobs[10 + index]
                assert output.token_ids[0] == int(row.argmax())
                assert abs(output.logprobs[0].logprob - float(row.max())) < 1e-3
    finally:
        engine.stop()
    assert changed == len(ADAPTERS), "an adapter that changes nothing tests nothing"


def base_logits(adapted: Any, ids: torch.Tensor) -> torch.Tensor:
    with adapted.disable_adapter():
        logits: torch.Tensor = adapted(ids).logits
        return logits


names = st.sampled_from([None, *ADAPTERS])


@given(
    st.lists(
        st.tuples(
            names,
            st.integers(0, 2),  # prompt: few, so that prefixes would be shared if they could be
            st.integers(1, 30),  # prompt length
            st.integers(1, 14),  # tokens to generate
            st.integers(0, 6),  # milliseconds to wait before arriving
            st.one_of(st.none(), st.integers(0, 6)),  # outputs after which the caller goes away
        ),
        min_size=1,
        max_size=10,
    )
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_request_gets_the_same_output_alone_and_in_any_mix(
    engine: Engine, requests: list[tuple[str | None, int, int, int, int, int | None]]
) -> None:
    async def one(index: int) -> list[int]:
        name, seed, length, count, delay, leaves_after = requests[index]
        await asyncio.sleep(delay / 1000)
        found: list[int] = []
        stream = engine.generate(
            Request(f"{index}", prompt(seed, length), greedy(count), adapter=name)
        )
        async for output in stream:
            found += output.token_ids
            if leaves_after is not None and len(found) > leaves_after:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return found

    async def mixed() -> list[list[int]]:
        return await asyncio.gather(*(one(index) for index in range(len(requests))))

    found = asyncio.run(mixed())
    for index, (name, seed, length, count, _, leaves_after) in enumerate(requests):
        request = Request("alone", prompt(seed, length), greedy(count), adapter=name)
        whole = tokens(asyncio.run(collect(engine, request)))
        assert found[index] == whole[: len(found[index])]
        assert leaves_after is not None or found[index] == whole


RANKS = (1, 8, 64, 256)


@pytest.fixture(scope="module", params=["bf16", "gptq", "desc_act", "awq", "nf4"])
def compiled_engine(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    """In bfloat16, which the compiled kernels compute, with adapters of all ranks in 3 slots."""
    folder = quantized(tiny_model(), tmp_path_factory.mktemp("base") / "model", request.param)
    engine = start(folder, dtype=torch.bfloat16, adapters=AdapterConfig(slots=3, max_rank=256))
    for rank in RANKS:
        engine.load_adapter(f"{rank}", str(tiny_adapter(seed=rank, r=rank)))
    yield engine
    engine.stop()


def test_every_rank_in_any_mix_on_every_base_says_what_it_says_alone(
    compiled_engine: Engine,
) -> None:
    """Log probabilities are equal to the last bit: no kernel's row depends on the others."""
    engine = compiled_engine

    def request(kind: tuple[int | None, int, int], count: int) -> Request:
        rank, seed, length = kind
        adapter = None if rank is None else f"{rank}"
        return Request("r", prompt(seed, length), greedy(count, logprobs=0), adapter=adapter)

    def said(outputs: list[RequestOutput]) -> list[tuple[int, float]]:
        return [(o.token_ids[0], o.logprobs[0].logprob) for o in outputs]

    @functools.cache
    def alone(kind: tuple[int | None, int, int]) -> list[tuple[int, float]]:
        return said(asyncio.run(collect(engine, request(kind, 8))))

    kinds = st.tuples(
        st.sampled_from([None, *RANKS]), st.integers(0, 1), st.sampled_from([3, 8, 30])
    )

    @given(st.lists(st.tuples(kinds, st.integers(1, 8)), min_size=2, max_size=8))
    @settings(max_examples=12, deadline=None)
    def check(mix: list[tuple[tuple[int | None, int, int], int]]) -> None:
        async def together() -> list[list[RequestOutput]]:
            requests = (
                replace(request(kind, count), request_id=f"{i}")
                for i, (kind, count) in enumerate(mix)
            )
            return await asyncio.gather(*(collect(engine, each) for each in requests))

        for (kind, count), outputs in zip(mix, asyncio.run(together()), strict=True):
            assert said(outputs) == alone(kind)[:count]

    check()
    answers = {tuple(alone((rank, 0, 8))) for rank in (None, *RANKS)}
    assert len(answers) == len(RANKS) + 1, "adapters that change nothing test nothing"


def test_captured_decode_steps_mix_adapters_alike(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], recomputed: type
) -> None:
    captured: list[Any] = []

    def capture(function: Callable[[], torch.Tensor]) -> tuple[object, torch.Tensor]:
        captured.append(recomputed(function))
        return captured[-1], captured[-1].out

    async def crowd(engine: Engine) -> list[list[int]]:
        requests = [
            Request(f"{i}", prompt(i, 5 + i), greedy(6 + 4 * i), adapter=name)
            for i, name in enumerate([*ADAPTERS, None])
        ]
        return [tokens(r) for r in await asyncio.gather(*(collect(engine, q) for q in requests))]

    found = []
    for use_graphs in (False, True):
        engine = Engine.load(open_checkpoint(tiny_model()), CONFIG, progress=False)
        if use_graphs:
            engine._runner.capture(capture, progress=False)
        engine.start()
        for name, options in ADAPTERS.items():
            engine.load_adapter(name, str(tiny_adapter(**options)))
        found.append(asyncio.run(crowd(engine)))
        engine.stop()
    assert found[0] == found[1]
    assert sum(graph.replays > 0 for graph in captured) >= 2


def test_cached_prefixes_are_shared_only_within_an_adapter(engine: Engine) -> None:
    ids = prompt(77, 17)

    def cached(adapter: str | None) -> int:
        outputs = asyncio.run(collect(engine, Request("r", ids, greedy(1), adapter=adapter)))
        return outputs[-1].cached_tokens

    assert [cached(None), cached("full"), cached("patterns")] == [0, 0, 0]
    assert [cached(None), cached("full"), cached("patterns")] == [16, 16, 16]


def test_an_unknown_adapter_is_refused_with_those_there_are(engine: Engine) -> None:
    with pytest.raises(ParameterError) as refused:
        ask(engine, "fulll")
    assert refused.value.parameter == "adapter"
    expected = "adapter 'fulll' is not loaded; loaded: full, patterns, rank 8 attention"
    assert str(refused.value) == expected


def test_an_engine_without_room_for_adapters_says_so(tiny_model: Callable[..., Path]) -> None:
    engine = start(tiny_model(), adapters=None)
    try:
        with pytest.raises(ParameterError, match="started without room for adapters"):
            ask(engine, "any")
        assert engine.adapters() == []
    finally:
        engine.stop()


def test_an_adapter_that_does_not_fit_the_server_changes_nothing(
    engine: Engine, tiny_adapter: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    before = {info.name: info.version for info in engine.adapters()}
    with pytest.raises(AdapterError, match="has rank 16, but this server holds adapters up to"):
        engine.load_adapter("full", str(tiny_adapter(r=16)))
    assert {info.name: info.version for info in engine.adapters()} == before
    small = start(tiny_model(), adapters=AdapterConfig(slots=1, max_rank=8, host_bytes=1000))
    try:
        with pytest.raises(AdapterError, match="the host memory for adapters is 1000"):
            small.load_adapter("full", str(tiny_adapter(seed=1)))
    finally:
        small.stop()


def test_a_replaced_adapter_serves_old_requests_with_the_old_version(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    engine = start(tiny_model())
    old, new = (str(tiny_adapter(**ADAPTERS[name])) for name in ("full", "patterns"))
    try:
        engine.load_adapter("a", old)
        expected_old = ask(engine, "a", count=40)

        async def replace_midway() -> tuple[list[int], list[int]]:
            found: list[int] = []
            stream = engine.generate(Request("old", prompt(0, 9), greedy(40), adapter="a"))
            async for output in stream:
                found += output.token_ids
                if len(found) == 5:
                    await asyncio.to_thread(engine.load_adapter, "a", new)
                    later = asyncio.create_task(
                        collect(engine, Request("new", prompt(0, 9), greedy(40), adapter="a"))
                    )
            return found, tokens(await later)

        found_old, found_new = asyncio.run(replace_midway())
        assert found_old == expected_old
        assert found_new == ask(engine, "a", count=40) != expected_old
        assert len(engine.adapters()) == 1
    finally:
        engine.stop()


def test_an_unloaded_adapter_finishes_what_it_began(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    engine = start(tiny_model())
    try:
        engine.load_adapter("a", str(tiny_adapter(seed=1)))
        expected = ask(engine, "a", count=30)

        async def unload_midway() -> list[int]:
            found: list[int] = []
            async for output in engine.generate(
                Request("r", prompt(0, 9), greedy(30), adapter="a")
            ):
                found += output.token_ids
                if len(found) == 3:
                    engine.unload_adapter("a")
            return found

        assert asyncio.run(unload_midway()) == expected
        with pytest.raises(ParameterError, match="adapter 'a' is not loaded; loaded: none"):
            ask(engine, "a")
        with pytest.raises(ParameterError, match="adapter 'a' is not loaded"):
            engine.unload_adapter("a")
    finally:
        engine.stop()


def test_files_that_change_under_a_loaded_adapter_fail_its_requests_and_no_other(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """With memory for one adapter the second pushes the first back to disk."""
    engine = start(tiny_model())
    size = engine.load_adapter("probe", str(tiny_adapter(seed=1))).nbytes
    engine.stop()
    engine = start(tiny_model(), adapters=AdapterConfig(slots=1, max_rank=4, host_bytes=size))
    folder = Path(shutil.copytree(tiny_adapter(seed=1), tmp_path / "a"))
    try:
        engine.load_adapter("a", str(folder))
        expected = ask(engine, "a")
        engine.load_adapter("b", str(tiny_adapter(seed=4)))
        ask(engine, "b")
        assert {info.name: info.residency for info in engine.adapters()} == {
            "a": "disk",
            "b": "device",
        }
        assert ask(engine, "a") == expected
        ask(engine, "b")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
        with pytest.raises(AdapterUnavailableError, match="has changed since adapter 'a' was load"):
            ask(engine, "a")
        shutil.rmtree(folder)
        with pytest.raises(AdapterUnavailableError, match=r"has no adapter_config\.json"):
            ask(engine, "a")
        assert engine.healthy
        ask(engine, "b")
    finally:
        engine.stop()


def test_infos_tell_rank_size_hits_and_residency(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    engine = start(tiny_model())
    try:
        engine.load_adapter("a", str(tiny_adapter(seed=1)))
        assert engine.adapters()[0].hits == 0
        ask(engine, "a")
        ask(engine, "a")
        (info,) = engine.adapters()
        assert (info.name, info.rank, info.hits, info.residency) == ("a", 4, 2, "device")
        assert info.path == str(tiny_adapter(seed=1))
        # Two layers; rank 4; float32; q, k, v, o, gate, up, down with 128 inputs (down: 256).
        assert info.nbytes == 2 * 4 * 4 * ((3 + 1 + 2) * 128 + 256 + (256 + 128 + 512 + 128))
    finally:
        engine.stop()


def scaled(folder: Path, target: Path, factor: float) -> str:
    """A copy of an adapter, all its matrices multiplied."""
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    save_file({name: factor * tensor for name, tensor in load_file(file).items()}, file)
    return str(target)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are read whatever the size of their values."""
    for module in ("adapter", "adapter_tensors"):
        monkeypatch.setattr(f"nybble.loaders.{module}.LARGEST", math.inf)


@pytest.mark.usefixtures("any_size")
def test_an_adapter_that_computes_no_number_fails_its_requests_and_no_other(
    engine: Engine, tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    engine.load_adapter("wild", scaled(tiny_adapter(seed=1), tmp_path / "wild", 1e30))
    alone = ask(engine, "full")
    asked: list[tuple[SamplingParams, Any]] = [
        (greedy(5), None),
        (SamplingParams(max_tokens=5, top_k=5), None),
        (greedy(5, logprobs=2), None),
        (greedy(0, prompt_logprobs=2), None),
        (greedy(0), "last"),
        (greedy(0), "mean"),
    ]
    for params, pooling in asked:

        async def beside(
            params: SamplingParams = params, pooling: Any = pooling
        ) -> tuple[list[RequestOutput], object]:
            wild = Request("wild", prompt(1, 9), params, adapter="wild", pooling=pooling)
            sound = Request("sound", prompt(0, 9), greedy(12), adapter="full")
            both = (collect(engine, sound), collect(engine, wild))
            first, second = await asyncio.gather(*both, return_exceptions=True)
            assert isinstance(first, list)
            return first, second

        outputs, failure = asyncio.run(beside())
        assert tokens(outputs) == alone
        assert isinstance(failure, NotANumberError)
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
    engine.unload_adapter("wild")


@pytest.mark.usefixtures("any_size")
def test_an_adapter_beyond_the_slots_dtype_is_refused(
    engine: Engine, tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    huge = scaled(tiny_adapter(seed=1), tmp_path / "huge", 1e20)
    config = tmp_path / "huge" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1e30}))
    with pytest.raises(AdapterError, match=r"times alpha / r, torch\.float32 cannot hold"):
        engine.load_adapter("huge", huge)
    assert engine.adapter("huge") is None


def test_an_adapter_may_have_rank_512(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    from peft import PeftModel

    checkpoint, folder = open_checkpoint(tiny_model()), tiny_adapter(r=512, use_rslora=True)
    model = PeftModel.from_pretrained(reference.transformers_model(checkpoint), folder)
    (expected,) = reference.greedy(model.eval(), (11,), 12)
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=1, max_rank=512))
    try:
        assert engine.load_adapter("wide", str(folder)).rank == 512
        assert reference.alone(engine, expected.prompt, 12, adapter="wide") == expected.tokens
        assert reference.alone(engine, expected.prompt, 12) != expected.tokens
    finally:
        engine.stop()


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, id="bfloat16"),
    ],
)
def test_a_step_mixes_64_adapters(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    """Of one training, each with the half of its ranks that its number names."""
    tensors = load_file(tiny_adapter(r=8) / "adapter_model.safetensors")
    names = [f"{number}" for number in range(64)]
    for name in names:
        folder = Path(shutil.copytree(tiny_adapter(r=8), tmp_path / name))
        keep = torch.tensor([(int(name) * 7 + rank * 5) % 8 < 4 for rank in range(8)])
        scale = 1 + int(name) / 16
        changed = {k: t * keep * scale if "lora_B" in k else t for k, t in tensors.items()}
        save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
    engine = reference.start(
        open_checkpoint(tiny_model()),
        dtype=dtype,
        adapters=AdapterConfig(slots=64, max_rank=8),
        max_num_seqs=64,
        max_batched_tokens=128,
    )
    asked = range(3, 12)

    async def together() -> list[list[int]]:
        each = (
            reference.collect(engine, name, asked, max_tokens=6, adapter=name) for name in names
        )
        return await asyncio.gather(*each)

    try:
        for name in names:
            engine.load_adapter(name, str(tmp_path / name))
        found = asyncio.run(together())  # which also fills the slots
        assert len({tuple(tokens) for tokens in found}) > 8
        assert engine.adapter_usage().device == 64
        assert asyncio.run(together()) == found
        for name, tokens in list(zip(names, found, strict=True))[::5]:
            assert reference.alone(engine, asked, 6, adapter=name) == tokens
    finally:
        engine.stop()
