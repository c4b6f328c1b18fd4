"""Mixtures of adapters: named in a request, or stored under a name, against peft."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from nybble.engine import (
    AdapterConfig,
    AdapterError,
    AdapterMixture,
    AdapterUnavailableError,
    ParameterError,
    Request,
    SamplingParams,
)
from nybble.loaders import open_checkpoint
from nybble.quantizers import quantize_checkpoint

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"seed": 1, "target_modules": ["q_proj", "up_proj", "lm_head"]},
    "b": {"seed": 2, "r": 3, "use_rslora": True},
    "c": {"seed": 3, "r": 2, "lora_alpha": 5, "target_modules": ["down_proj", "embed_tokens"]},
}
MIXTURES = [
    {"a": 0.7, "b": 0.3},
    {"a": 1.5, "c": -0.5},
    {"a": 0.2, "b": 0.6, "c": 0.9},
    {"c": 0.5},
]
ENGINE = {"adapters": AdapterConfig(slots=3, max_rank=9), "max_num_seqs": 12}


@pytest.mark.parametrize("format", [pytest.param("bf16", marks=pytest.mark.slow), "gptq"])
def test_a_mixture_says_what_peft_says_of_the_weighted_sum_alone_and_in_company(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    format: str,
) -> None:
    """In one step with its adapters by themselves and the base, in fewer slots than there are."""
    base = tiny_model()
    if format != "bf16":
        quantize_checkpoint(base, tmp_path / "q", format=format, group_size=32, progress=False)  # type: ignore[arg-type]
        base = tmp_path / "q"
    checkpoint = open_checkpoint(base)
    model = PeftModel.from_pretrained(
        reference.transformers_model(checkpoint), tiny_adapter(**ADAPTERS["a"]), adapter_name="a"
    )
    for name in ("b", "c"):
        model.load_adapter(tiny_adapter(**ADAPTERS[name]), adapter_name=name)
    cases: list[tuple[Any, list[int], list[int], list[float]]] = []
    for chosen in (*MIXTURES, "a", "b"):
        if isinstance(chosen, str):
            model.set_adapter(chosen)
        else:
            name = f"mixture {len(cases)}"
            weights = list(chosen.values())
            model.add_weighted_adapter(list(chosen), weights, name, combination_type="cat")
            model.set_adapter(name)
        (found,) = reference.greedy(model.eval(), (11,), 8)
        ids = torch.tensor([[*found.prompt, *found.tokens]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, 10:-1], -1)
        own = logprobs.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
        adapter = chosen if isinstance(chosen, str) else AdapterMixture(chosen)
        cases.append((adapter, found.prompt, found.tokens, own.tolist()))
    with model.disable_adapter():
        (plain,) = reference.greedy(model, (11,), 8)
    cases.append((None, plain.prompt, plain.tokens, []))
    assert len({tuple(tokens) for _, _, tokens, _ in cases}) == len(cases)
    engine = reference.start(checkpoint, **ENGINE)

    async def said(adapter: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
        request = Request(f"{adapter}", tuple(prompt), params, adapter=adapter)
        outputs = [output async for output in engine.generate(request)]
        return (
            [token for output in outputs for token in output.token_ids],
            [each.logprob for output in outputs for each in output.logprobs],
        )

    async def together() -> list[tuple[list[int], list[float]]]:
        return await asyncio.gather(*(said(adapter, prompt) for adapter, prompt, *_ in cases))

    try:
        for name, options in ADAPTERS.items():
            engine.load_adapter(name, str(tiny_adapter(**options)))
        for adapter, prompt, tokens, _ in cases:
            assert asyncio.run(said(adapter, prompt))[0] == tokens, adapter
        for (adapter, _, tokens, own), (found, logprobs) in zip(
            cases, asyncio.run(together()), strict=True
        ):
            assert found == tokens, adapter
            if own:
                torch.testing.assert_close(logprobs, own, atol=1e-3, rtol=0)
    finally:
        engine.stop()


def test_a_mixture_can_have_a_name_and_be_mixed_in_turn(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """It keeps the adapters that it was made of, whatever becomes of their names."""
    engine = reference.start(open_checkpoint(tiny_model()), **ENGINE)

    def said(adapter: str) -> list[int]:
        return list(reference.alone(engine, range(3, 20), 8, adapter=adapter))

    try:
        for name, options in ADAPTERS.items():
            engine.load_adapter(name, str(tiny_adapter(**options)))
        expected = said(AdapterMixture({"a": 0.5, "b": 0.25, "c": 2}))
        info = engine.load_mixture("half", AdapterMixture({"a": 1, "b": 0.5}))
        assert (info.mixture, info.path, info.rank) == ({"a": 1, "b": 0.5}, "", 7)
        assert said(AdapterMixture({"half": 0.5, "c": 2})) == expected
        before = said("half")
        engine.unload_adapter("a")
        with pytest.raises(ParameterError, match="adapter 'a' is not loaded"):
            said(AdapterMixture({"a": 0.5, "b": 0.25}))
        assert said("half") == before
        assert said(AdapterMixture({"half": 0.5, "c": 2})) == expected
        assert [info.name for info in engine.adapters()] == ["b", "c", "half"]
    finally:
        engine.stop()


def test_a_mixture_follows_an_adapter_that_is_replaced(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    engine = reference.start(open_checkpoint(tiny_model()), **ENGINE)
    mixture = AdapterMixture({"a": 1.5, "b": 0.5})

    def said() -> list[int]:
        return list(reference.alone(engine, range(3, 20), 8, adapter=mixture))

    try:
        engine.load_adapter("b", str(tiny_adapter(**ADAPTERS["b"])))
        found = []
        for seed in (1, 7):
            engine.load_adapter("a", str(tiny_adapter(seed=seed)))
            found.append(said())
        assert found[0] != found[1]
        folder = Path(shutil.copytree(tiny_adapter(seed=1), tmp_path / "a"))
        engine.load_adapter("a", str(folder))
        shutil.copytree(tiny_adapter(seed=8), folder, dirs_exist_ok=True)
        with pytest.raises(AdapterUnavailableError, match="has changed since adapter"):
            said()
        engine.load_adapter("a", str(tiny_adapter(seed=1)))
        assert said() == found[0]
    finally:
        engine.stop()


def test_adapters_with_settings_of_their_own_are_mixed_as_those_without(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Whatever becomes of the settings, of which a mixture has none."""
    engine = reference.start(open_checkpoint(tiny_model()), **ENGINE)

    def said(adapter: Any) -> list[int]:
        return list(reference.alone(engine, range(3, 20), 8, adapter=adapter))

    try:
        for name in ("a", "b"):
            plain = tiny_adapter(**ADAPTERS[name])
            own = Path(shutil.copytree(plain, tmp_path / name))
            (own / "chat_template.jinja").write_text("{{ messages[0]['content'] }}:")
            (own / "generation_config.json").write_text('{"eos_token_id": 299}')
            engine.load_adapter(name, str(plain))
            engine.load_adapter(f"own {name}", str(own))
        expected = said(AdapterMixture({"a": 0.5, "b": 2}))
        assert said(AdapterMixture({"own a": 0.5, "own b": 2})) == expected
        assert said(AdapterMixture({"own a": 0.5, "b": 2})) == expected
        (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
        engine.load_mixture("half", AdapterMixture({"own a": 0.25, "own b": 1}))
        assert said(AdapterMixture({"half": 2})) == expected
    finally:
        engine.stop()


def test_a_mixture_gets_no_name_if_files_of_an_adapter_have_changed(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """It would not be a mixture of the adapters that are loaded."""
    engine = reference.start(open_checkpoint(tiny_model()), **ENGINE)
    mixture = AdapterMixture({"b": 0.5, "a": 1.5})

    def said(adapter: Any) -> list[int]:
        return list(reference.alone(engine, range(3, 20), 8, adapter=adapter))

    try:
        folder = Path(shutil.copytree(tiny_adapter(seed=1), tmp_path / "a"))
        engine.load_adapter("a", str(folder))
        engine.load_adapter("b", str(tiny_adapter(**ADAPTERS["b"])))
        before = said(mixture)
        shutil.copytree(tiny_adapter(seed=8), folder, dirs_exist_ok=True)
        with pytest.raises(AdapterError, match=f"{folder} has changed since adapter 'a' was load"):
            engine.load_mixture("mixed", mixture)
        assert [info.name for info in engine.adapters()] == ["a", "b"]
        assert said(mixture) == before
        engine.load_adapter("a", str(folder))
        engine.load_mixture("mixed", mixture)
        assert said("mixed") == said(mixture) != before
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "a mixture of 0 adapters, expected 1 to 8"),
        ({f"{n}": 1 for n in range(9)}, "a mixture of 9 adapters"),
        ({"a": float("nan")}, "adapter 'a' has the weight nan, expected at most 1000"),
        ({"a": 1, "b": -1e308}, "adapter 'b' has the weight -1e\\+308, expected at most 1000"),
        ({"a": 1, "nobody": 1}, "adapter 'nobody' is not loaded; loaded: a, b, dora"),
        ({"a": 1, "dora": 1}, "adapter 'dora' has DoRA on .*: only plain LoRA can be mixed"),
        ({"a": 1, "b": 1}, r"1.0\*a \+ 1.0\*b has rank 12, but this server holds adapters up to"),
    ],
)
def test_what_cannot_be_mixed_is_named(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    weights: dict[str, float],
    message: str,
) -> None:
    adapters = {"a": {"r": 8}, "b": {}, "dora": {"use_dora": True}}
    engine = reference.start(open_checkpoint(tiny_model()), **ENGINE)
    try:
        for name, options in adapters.items():
            engine.load_adapter(name, str(tiny_adapter(**options)))
        with pytest.raises(ParameterError, match=message):
            reference.alone(engine, range(9), 1, adapter=AdapterMixture(weights))
    finally:
        engine.stop()


@pytest.mark.slow
def test_many_mixtures_leave_nothing_behind(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """Clients may ask for any number of different weights."""
    engine = reference.start(open_checkpoint(tiny_model()), **ENGINE)
    registry = engine._adapters
    try:
        engine.load_adapter("b", str(tiny_adapter(**ADAPTERS["b"])))
        for weight in range(300):
            mixture = AdapterMixture({"b": weight / 100})
            reference.alone(engine, range(3, 9), 1, adapter=mixture)
        assert len(registry._mixtures) == 256
        assert len(registry.cache._host) <= 257
        engine.unload_adapter("b")
        engine.load_adapter("b", str(tiny_adapter(**ADAPTERS["b"])))
        reference.alone(engine, range(3, 9), 1, adapter="b")
        assert not registry._mixtures
        assert len(registry.cache._host) == 1
    finally:
        engine.stop()
