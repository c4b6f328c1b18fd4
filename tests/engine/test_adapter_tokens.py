"""Adapters with tokens of their own, against peft and transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from nybble.engine import AdapterConfig, Engine, GrammarCompiler, Request, SamplingParams
from nybble.loaders import AdapterError, open_checkpoint
from nybble.quantizers import quantize_checkpoint

BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "rows saved as they are": {},
    "rows trained": {"new_rows": "trained"},
    "matrices trained": {"modules_to_save": BOTH},
    "kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on both": {"target_modules": ["v_proj", *BOTH]},
    "more rows than tokens": {"rows": 384},
}
BASE = 320  # tokens of the tiny model
PROMPT = "the <plan> fox<|tool|> jumps zyx over"


@pytest.mark.parametrize(
    ("format", "tied"),
    [
        ("bf16", True),
        ("nf4", False),
        pytest.param("bf16", False, marks=pytest.mark.slow),
        pytest.param("nf4", True, marks=pytest.mark.slow),
    ],
)
def test_each_kind_says_what_peft_says_alone_and_in_company(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
    format: str,
    tied: bool,
) -> None:
    """Beside the base and an adapter without tokens of its own, in two slots."""
    base = tiny_model(tie_word_embeddings=tied)
    if format != "bf16":
        quantize_checkpoint(base, tmp_path / "q", format=format, group_size=32, progress=False)  # type: ignore[arg-type]
        base = tmp_path / "q"
    checkpoint = open_checkpoint(base)
    kinds = [kind for kind in KINDS if tied or kind != "kept tied"]
    engine = reference.start(checkpoint, adapters=AdapterConfig(slots=2, max_rank=4))
    expected, prompts = {}, {}
    for kind in kinds:
        folder = tiny_token_adapter(tied=tied, **KINDS[kind])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts[kind] = tokenizer(PROMPT)["input_ids"]
        model = reference.transformers_model(checkpoint)
        model.resize_token_embeddings(KINDS[kind].get("rows", len(tokenizer)), mean_resizing=False)
        model = PeftModel.from_pretrained(model, folder).eval()
        ids = torch.tensor([prompts[kind]])
        with torch.no_grad():
            for _ in range(10):
                logits = model(ids).logits[0]
                logits[:, len(tokenizer) :] = -torch.inf
                ids = torch.cat([ids, logits[-1:].argmax(-1)[None]], dim=1)
            found = torch.log_softmax(logits, -1)
        tokens = ids[0, len(prompts[kind]) :].tolist()
        logprobs = found.gather(1, ids[0, 1:, None])[:, 0]
        expected[kind] = tokens, logprobs
    assert sum(max(tokens) >= BASE for tokens, _ in expected.values()) > len(kinds) // 2

    async def said(kind: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
        params = SamplingParams(
            max_tokens=10, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
        request = Request(f"{kind}", tuple(prompt), params, adapter=kind)
        tokens: list[int] = []
        found: list[float] = []
        async for output in engine.generate(request):
            if output.prompt_logprobs is not None:
                found += output.prompt_logprobs.logprobs.tolist()
            tokens += output.token_ids
            found += [each.logprob for each in output.logprobs]
        return tokens, found

    async def together() -> list[tuple[list[int], list[float]]]:
        each = (said(kind, prompts[kind]) for kind in kinds)
        others = (said(None, list(range(9, 20))), said("plain", list(range(9, 20))))
        return await asyncio.gather(*others, *each)

    try:
        engine.load_adapter("plain", str(tiny_adapter(tied=tied)))
        alone = [asyncio.run(said(name, list(range(9, 20)))) for name in (None, "plain")]
        for kind in kinds:
            engine.load_adapter(kind, str(tiny_token_adapter(tied=tied, **KINDS[kind])))
            text = engine.tokens_of(kind).tokenizer.backend_tokenizer
            assert text.encode(PROMPT).ids == prompts[kind]
            assert asyncio.run(said(kind, prompts[kind]))[0] == expected[kind][0], kind
        for found in (asyncio.run(together()), asyncio.run(together())):
            wanted = [*alone, *(expected[kind] for kind in kinds)]
            for name, (tokens, logprobs), (said_alone, exact) in zip(
                ("base", "plain", *kinds), found, wanted, strict=True
            ):
                assert tokens == said_alone, name
                torch.testing.assert_close(
                    torch.tensor(logprobs),
                    torch.as_tensor(exact),
                    atol=1e-3,
                    rtol=0,
                    msg=lambda m, name=name: name + m,
                )
    finally:
        engine.stop()


def test_in_16_bits_all_say_in_company_what_they_say_alone_to_the_last_bit(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """With the compiled kernels; the base and adapters of different numbers of tokens."""
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    engine = reference.start(
        open_checkpoint(tmp_path / "q"),
        dtype=torch.bfloat16,
        adapters=AdapterConfig(slots=3, max_rank=4),
    )
    names = [None, "saved", "more rows"]

    async def said(name: str | None) -> list[tuple[int, float]]:
        params = SamplingParams(max_tokens=8, temperature=0.7, seed=1, ignore_eos=True, logprobs=0)
        request = Request(f"{name}", tuple(range(5, 14)), params, adapter=name)
        found = [output async for output in engine.generate(request)]
        return [(output.token_ids[0], output.logprobs[0].logprob) for output in found]

    async def together() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*map(said, names))

    try:
        engine.load_adapter("saved", str(tiny_token_adapter()))
        engine.load_adapter("more rows", str(tiny_token_adapter(rows=390)))
        for name, found in zip(names, asyncio.run(together()), strict=True):
            assert asyncio.run(said(name)) == found, name
    finally:
        engine.stop()


@pytest.fixture
def engine(reference: Any, tiny_model: Callable[..., Path]) -> Any:
    engine = reference.start(
        open_checkpoint(tiny_model()), adapters=AdapterConfig(slots=4, max_rank=8)
    )
    yield engine
    engine.stop()


def test_no_row_ever_gets_a_token_that_its_adapter_does_not_know(
    engine: Engine, tiny_adapter: Callable[..., Path], tiny_token_adapter: Callable[..., Path]
) -> None:
    """At a temperature at which every token is as likely as any other."""
    few = tiny_token_adapter()
    many = tiny_token_adapter(tokens=tuple(f"<{n}>" for n in range(100)), rows=512)
    for name, folder in (("few", few), ("many", many), ("plain", tiny_adapter())):
        engine.load_adapter(name, str(folder))
    known = {None: BASE, "plain": BASE, "few": BASE + 4, "many": BASE + 101}
    assert {name: engine.tokens_of(name).known for name in known} == known

    async def said(name: str | None) -> tuple[int, int]:
        params = SamplingParams(
            max_tokens=120, temperature=100.0, ignore_eos=True, seed=1, logprobs=3
        )
        request = Request(f"{name}", tuple(range(9, 20)), params, adapter=name)
        highest = top = 0
        async for output in engine.generate(request):
            highest = max(highest, *output.token_ids)
            top = max(top, *(token for each in output.logprobs for token, _ in each.top))
        return highest, top

    async def together() -> list[tuple[int, int]]:
        return await asyncio.gather(*(said(name) for name in known))

    for (name, most), (highest, top) in zip(known.items(), asyncio.run(together()), strict=True):
        assert max(highest, top) < most, name
        assert highest >= (BASE if most > BASE + 4 else 0)


def test_adapters_with_the_same_tokens_share_them_and_mixtures_have_none(
    engine: Engine, tiny_adapter: Callable[..., Path], tiny_token_adapter: Callable[..., Path]
) -> None:
    first = engine.load_adapter("first", str(tiny_token_adapter()))
    second = engine.load_adapter("second", str(tiny_token_adapter(new_rows="trained")))
    plain = engine.load_adapter("plain", str(tiny_adapter()))
    assert (first.own_tokens, second.own_tokens, plain.own_tokens) == (4, 4, 0)
    assert engine.tokens_of("first") is engine.tokens_of("second")
    assert engine.tokens_of("plain") is engine.tokens_of(None) is engine.tokens
    # Their vocabulary is the base's, of which they have no copy.
    assert first.nbytes < 320 * 128 * 4


def test_a_grammar_can_force_a_token_of_the_adapters(
    engine: Engine, tiny_token_adapter: Callable[..., Path]
) -> None:
    engine.load_adapter("own", str(tiny_token_adapter()))
    tokens = engine.tokens_of("own")
    compiler = GrammarCompiler(tokens.tokenizer, tokens.rows, tokens.ends)
    guide = compiler.grammar('start: <|tool|> "[" /[a-z]{1,3}/ "]" <|done|>')
    request = Request(
        "guided", tuple(range(9, 20)), SamplingParams(temperature=0), guide, adapter="own"
    )

    async def run() -> list[int]:
        return [token async for output in engine.generate(request) for token in output.token_ids]

    said = asyncio.run(run())
    text = tokens.tokenizer.backend_tokenizer.decode(said, skip_special_tokens=False)
    assert text.startswith("<|tool|>[")
    assert text.endswith("]<|done|>")


def test_its_end_token_ends_its_texts_and_is_left_out_of_them(
    reference: Any, engine: Engine, tiny_token_adapter: Callable[..., Path]
) -> None:
    engine.load_adapter("own", str(tiny_token_adapter()))
    end = engine.tokens_of("own").tokenizer.eos_token_id
    assert end == BASE

    async def said(**options: Any) -> tuple[str, list[int]]:
        params = SamplingParams(max_tokens=4, temperature=0, logit_bias={end: 100.0}, **options)
        request = Request("one", tuple(range(9, 20)), params, adapter="own")
        outputs = [output async for output in engine.generate(request)]
        return "".join(o.text for o in outputs), [t for o in outputs for t in o.token_ids]

    assert asyncio.run(said()) == ("", [end])
    shown = asyncio.run(said(ignore_eos=True, skip_special_tokens=False))
    assert shown == ("<|done|>" * 4, [end] * 4)


@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_drafts_change_nothing(
    reference: Any,
    engine: Engine,
    tiny_model: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    speculate: Any,
) -> None:
    """A smaller model, which does not know the tokens, drafts for the others alone."""
    checkpoint = open_checkpoint(tiny_model())
    drafting = Engine.load(
        checkpoint,
        reference.EngineConfig(
            dtype=torch.float32,
            kv_cache_bytes=1 << 22,
            max_num_seqs=8,
            max_batched_tokens=64,
            speculate=speculate,
            adapters=AdapterConfig(slots=2, max_rank=8),
        ),
        progress=False,
        draft=open_checkpoint(tiny_model(seed=1)) if speculate == "draft" else None,
    )
    drafting.start()
    try:
        for each in (engine, drafting):
            each.load_adapter("own", str(tiny_token_adapter()))
        prompt = engine.tokens_of("own").tokenizer.backend_tokenizer.encode(PROMPT * 3).ids
        expected = reference.alone(engine, prompt, 24, adapter="own")
        assert reference.alone(drafting, prompt, 24, adapter="own") == expected
        assert reference.alone(drafting, prompt[:2], 8) == reference.alone(engine, prompt[:2], 8)
    finally:
        drafting.stop()


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_tokenizer_that_changes_the_bases_tokens_is_refused_by_name(
    engine: Engine, tiny_token_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    def grow(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["foxes"] = 500

    def lose(content: dict[str, Any]) -> None:
        del content["model"]["vocab"]["a"]

    def collide(content: dict[str, Any]) -> None:
        content["added_tokens"][-1]["id"] = 7

    for number, (change, message) in enumerate(
        (
            (swap, r"has 'a' as \d+, which is \d+ in the base"),
            (grow, "has 'foxes' in its vocabulary, which is not in the base's"),
            (lose, "lacks 'a', which the base has"),
            (collide, "has 'zyx' as 7, which is another token in the base"),
            (lambda content: content.pop("model"), "cannot be read"),
        )
    ):
        folder = Path(shutil.copytree(tiny_token_adapter(), tmp_path / f"{number}"))
        _edit(folder, change)
        with pytest.raises(AdapterError, match=message) as refused:
            engine.load_adapter("own", str(folder))
        assert "no-lora-own-settings" in str(refused.value)


def test_a_tokenizer_without_more_tokens_is_the_bases(
    engine: Engine,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Whatever else is in its files, which training libraries write beside every adapter."""
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder)
    own = engine.load_adapter("own", str(folder))
    assert own.own_tokens == 0
    assert engine.tokens_of("own") is engine.tokens


def test_tokens_without_a_row_are_left_out_and_rows_without_a_token_are_never_said(
    reference: Any,
    engine: Engine,
    tiny_adapter: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """As when a tokenizer got a token for padding, or when only the two files are there."""
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "rowless"))
    own = tiny_token_adapter()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(own / name, folder)
    assert engine.load_adapter("rowless", str(folder)).own_tokens == 0
    engine.load_adapter("plain", str(tiny_adapter()))
    expected = reference.alone(engine, range(9, 20), 8, adapter="plain")
    assert reference.alone(engine, range(9, 20), 8, adapter="rowless") == expected
    (tmp_path / "two").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(own / name, tmp_path / "two")
    assert engine.load_adapter("two", str(tmp_path / "two")).own_tokens == 0
    assert engine.tokens_of("two").known == BASE
    assert max(reference.alone(engine, range(9, 20), 40, adapter="two", temperature=9.0)) < BASE


def test_switched_off_its_tokens_are_unknown(
    reference: Any, tiny_model: Callable[..., Path], tiny_token_adapter: Callable[..., Path]
) -> None:
    engine = reference.start(
        open_checkpoint(tiny_model()), adapters=AdapterConfig(1, 8, own_settings=False)
    )
    try:
        assert engine.load_adapter("own", str(tiny_token_adapter())).own_tokens == 0
        text = engine.tokens_of("own").tokenizer
        assert text is engine.tokenizer
    finally:
        engine.stop()


def test_a_process_of_its_own_reads_the_files_and_says_why_it_ended(
    engine: Engine,
    tiny_adapter: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In this one all threads would wait. None is started for an adapter without such files."""
    worker = tmp_path / "worker.py"
    worker.write_text("raise MemoryError('too much')")
    monkeypatch.setattr("nybble.loaders.adapter_tokens._WORKER", worker)
    fresh = tiny_token_adapter(tokens=("<never>", "<plan>"))  # others' files have been read before
    with pytest.raises(AdapterError, match="ended with exit code 1: MemoryError: too much"):
        engine.load_adapter("fresh", str(fresh))
    engine.load_adapter("plain", str(tiny_adapter()))
    monkeypatch.undo()
    assert engine.load_adapter("fresh", str(fresh)).own_tokens > 0
