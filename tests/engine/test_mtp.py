"""MTP heads draft what their formula says, and change nothing but the speed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from nybble import LLM
from nybble.engine import AdapterConfig, Engine, EngineConfig, SamplingParams, memory
from nybble.engine.guide import GrammarCompiler
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.memory import memory_explained
from nybble.engine.scheduler import ScheduledBatch
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.formats import WriteOptions, writing_format
from nybble.loaders.mtp import draft_bytes, has_mtp, mtp_tensors, open_mtp
from nybble.models import UnsupportedModelError, architecture_of
from nybble.quantizers import quantize_checkpoint
from nybble.quantizers.rtn import round_to_nearest

from .heads import complete, drafter_of, prompt, recorded

CONFIG = EngineConfig(
    dtype=torch.bfloat16,
    block_size=4,
    kv_cache_bytes=1 << 22,
    max_num_seqs=6,
    max_batched_tokens=24,
    max_model_len=160,
    max_draft_tokens=4,
)


def hidden_of(folder: Path, tokens: list[int]) -> Tensor:
    """What transformers computes of a model, after the last norm: ``(tokens, hidden)``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    return found


def train(head: Any, target: Path, texts: list[list[int]], steps: int = 60) -> None:
    """Teach a head what follows in ``texts``, two tokens ahead."""
    ends = {id(each) for each in head.layer.model.embed_tokens.parameters()}
    ends |= {id(each) for each in head.layer.lm_head.parameters()}
    if head.shares_norm:
        ends |= {id(each) for each in head.layer.model.norm.parameters()}
    learnt = [each for each in head.parameters() if id(each) not in ends]
    for each in head.layer.lm_head.parameters():
        each.requires_grad_(False)
    for each in head.layer.model.embed_tokens.parameters():
        each.requires_grad_(False)
    known = [(hidden_of(target, text), torch.tensor(text)) for text in texts]
    optimizer = torch.optim.Adam(learnt, lr=5e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for hidden, text in known:
            out = head(hidden[:-2], text[1:-1])
            loss = loss + cross_entropy(head.layer.lm_head(out), text[2:])
            # Of the position before, what it has computed itself stands for what is not known.
            own = head(torch.cat([hidden[:1], out[:-1]]), text[1:-1])
            loss = loss + cross_entropy(head.layer.lm_head(own), text[2:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """``start(folder, mtp=True, **settings)``: an engine which drafts with the folder's head."""
    started: list[Engine] = []

    def start(folder: Path, mtp: bool = False, **settings: Any) -> Engine:
        settings.setdefault("speculate", "mtp" if mtp else "off")
        model = open_checkpoint(folder)
        draft = open_mtp(model) if mtp else None
        engine = Engine.load(model, replace(CONFIG, **settings), progress=False, draft=draft)
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture(scope="module")
def random_of(
    tiny_mtp: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Any]]:
    """A family's tiny model with a head of random weights: the folder, and the head."""
    built: dict[str, tuple[Path, Any]] = {}

    def build(family: str) -> tuple[Path, Any]:
        if family not in built:
            folder = tmp_path_factory.mktemp("mtp") / family
            built[family] = folder, tiny_mtp.write_tiny_mtp(folder, family)
        return built[family]

    return build


@pytest.fixture(scope="module")
def trained_of(
    tiny_mtp: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A family's tiny model whose head has learnt what it says greedily after some prompts."""
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family in built:
            return built[family]
        folder = built[family] = tmp_path_factory.mktemp("trained") / family
        head = tiny_mtp.write_tiny_mtp(folder, family)
        engine = Engine.load(open_checkpoint(folder), CONFIG, progress=False)
        engine.start()

        async def texts() -> list[list[int]]:
            prompts = [prompt(seed, 12 + 7 * seed) for seed in range(3)]
            answers = await asyncio.gather(
                *(complete(engine, str(place), ids) for place, ids in enumerate(prompts))
            )
            return [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]

        said = asyncio.run(texts())
        engine.stop()
        train(head, folder, said)
        tiny_mtp.store_tiny_mtp(folder, head)
        return folder

    return build


FAMILIES = [
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "qwen3_5_text",
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in ("glm4_moe_lite", "qwen3_next", "qwen3_5_moe_text")
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_those_of_the_reference(
    random_of: Callable[[str], tuple[Path, Any]],
    start: Callable[..., Engine],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a prompt read in chunks, at every step of two answers at the same time."""
    folder, reference = random_of(family)
    engine = start(folder, mtp=True, dtype=torch.float32)
    drafts = recorded(engine, monkeypatch)

    async def both() -> list[list[int]]:
        return await asyncio.gather(
            complete(engine, "a", prompt(1, 50), max_tokens=12),
            complete(engine, "b", prompt(2, 7), max_tokens=12),
        )

    answers = asyncio.run(both())
    texts = [[*prompt(1, 50), *answers[0]], [*prompt(2, 7), *answers[1]]]
    hidden = [hidden_of(folder, text) for text in texts]
    compared = 0
    for tokens, draft in drafts:
        (place,) = [n for n, text in enumerate(texts) if text[: len(tokens)] == tokens]
        expected = reference.draft(hidden[place][: len(tokens) - 1], tokens, len(draft.tokens))
        assert list(draft.tokens) == expected
        compared += len(draft.tokens)
    assert compared > 50


@pytest.mark.slow
def test_a_head_that_was_trained_is_often_right(
    trained_of: Callable[[str], Path], start: Callable[..., Engine]
) -> None:
    folder = trained_of("glm4_moe")
    expected = asyncio.run(complete(start(folder), "a", prompt(2, 26)))
    engine = start(folder, mtp=True)
    assert asyncio.run(complete(engine, "a", prompt(2, 26))) == expected
    stats = engine.stats()
    assert engine.draft_method == "mtp"
    assert stats.accepted_tokens > stats.draft_tokens / 3
    assert stats.steps < 30, "without drafts there are 41"


PATTERN = "([ab]{2,6}-){6}"
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "learnt": {},
    "sampled": {"seed": 5, "temperature": 1.2, "top_p": 0.9},
    "penalized": {"seed": 7, "temperature": 1.0, "repetition_penalty": 1.3},
    "guided": {"seed": 11, "temperature": 1.5, "ignore_eos": False},
}


async def everyone(engine: Engine) -> list[list[int]]:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    return await asyncio.gather(
        *(
            complete(
                engine,
                kind,
                prompt(2, 26) if kind == "learnt" else prompt(20 + place, 5 + 8 * place),
                guide=compiler.regex(PATTERN) if kind == "guided" else None,
                **asked,
            )
            for place, (kind, asked) in enumerate(ASKED.items())
        )
    )


@pytest.mark.parametrize(
    ("family", "preempting"),
    [
        ("glm4_moe", True),
        *(
            pytest.param(family, preempting, marks=pytest.mark.slow)
            for family, preempting in [
                *(("glm4_moe", False), ("deepseek_v3", False)),
                *(("qwen3_5_text", False), ("qwen3_5_text", True)),
                *(("deepseek_v3", True), ("qwen3_next", False), ("qwen3_next", True)),
            ]
        ),
    ],
)
def test_whatever_is_asked_the_answers_are_those_without_a_head(
    trained_of: Callable[[str], Path],
    start: Callable[..., Engine],
    family: str,
    preempting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks of prompts, twice, the second time with prefix caches."""
    folder = trained_of(family)
    expected = asyncio.run(everyone(start(folder)))
    drafting = start(folder, mtp=True)
    scheduler = drafting._thread._scheduler
    schedule, steps = scheduler.schedule, 0

    def preempt_now_and_then() -> ScheduledBatch:
        nonlocal steps
        steps += 1
        if preempting and steps % 4 == 0 and scheduler.running:
            scheduler.preempt(scheduler.running[steps // 4 % len(scheduler.running)])
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", preempt_now_and_then)
    for _ in range(2):
        assert asyncio.run(everyone(drafting)) == expected
    stats = drafting.stats()
    assert (stats.preemptions > 0) == preempting
    assert stats.draft_tokens > stats.accepted_tokens > 30
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert not drafter_of(drafting)._last


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text"])
def test_drafts_by_the_base_verify_against_adapters(
    trained_of: Callable[[str], Path],
    tiny_mtp: ModuleType,
    start: Callable[..., Engine],
    tmp_path: Path,
    family: str,
) -> None:
    """Beside a sequence without one, from whose prefix the adapter's is kept apart."""
    folder = trained_of(family)
    adapter = tiny_mtp.write_tiny_adapter(
        tmp_path / "adapter", folder, target_modules=["q_proj", "v_proj", "o_proj"]
    )
    found = []
    for mtp in (False, True):
        engine = start(folder, mtp=mtp, adapters=AdapterConfig(slots=2, max_rank=4))
        engine.load_adapter("a", str(adapter))

        async def both(engine: Engine = engine) -> list[list[int]]:
            return await asyncio.gather(
                *(complete(engine, str(use), prompt(2, 26), use) for use in (None, "a"))
            )

        found.append([asyncio.run(both()), asyncio.run(both())])
    assert found[0] == found[1]
    assert found[0][0][0] != found[0][0][1], "the adapter says something else"
    assert engine.stats().draft_tokens > 50


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text"])
def test_a_prefix_from_the_cache_was_read_by_the_head_too(
    random_of: Callable[[str], tuple[Path, Any]],
    start: Callable[..., Engine],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its hidden states are nowhere, and the drafts are those of a prompt that is read."""
    engine = start(random_of(family)[0], mtp=True, dtype=torch.float32)
    drafts = recorded(engine, monkeypatch)
    asyncio.run(complete(engine, "a", prompt(1, 50), max_tokens=8))
    read = list(drafts)
    drafts.clear()
    hits = engine.stats().prefix_hit_tokens
    asyncio.run(complete(engine, "b", prompt(1, 50), max_tokens=8))
    assert engine.stats().prefix_hit_tokens - hits == 48
    assert drafts == read != []


def test_what_it_takes_is_known_before_it_is_loaded(
    random_of: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of the KV cache, and its weights without copies of the model's own."""
    folder, reference = random_of("glm4_moe")
    model = open_checkpoint(folder)
    head = open_mtp(model)
    own = [each for name, each in reference.tensors().items() if "layers.2.embed" not in name]
    own = [each for each in own if each is not None]
    numbers = sum(each.numel() for each in own)
    ends = model.config.vocab_size * model.config.hidden_size
    router = 8 * model.config.hidden_size + 8  # in float32
    assert draft_bytes(head, torch.bfloat16) == 2 * (numbers - ends + router)
    assert weight_bytes(folder, torch.bfloat16) == sum(
        each.numel() * (4 if "mlp.gate." in name else 2)
        for name, each in load_file(folder / "model.safetensors").items()
        if not name.startswith("model.layers.2.")
    )
    # One of several ranks has all of the output layer to draft with, beside its part of it.
    alone, ranks = (replace(CONFIG, tensor_parallel_size=size) for size in (1, 2))
    assert memory._weight_bytes(model, alone, head) == weight_bytes(
        folder, torch.bfloat16
    ) + draft_bytes(head, torch.bfloat16)
    assert memory._weight_bytes(model, ranks, head) == (
        weight_bytes(folder, torch.bfloat16) // 2 + draft_bytes(head, torch.bfloat16) + 2 * ends
    )
    config = replace(CONFIG, speculate="mtp", kv_cache_bytes=1 << 40)
    layout = KVCacheLayout.of(architecture_of(model.config), config, 160)
    # As much as six sequences can fill: of two layers, and of the head's.
    most = 6 * layout.table_blocks(160) * layout.block_bytes * 3 // 2
    monkeypatch.setattr(memory, "available_bytes", lambda device: most)
    with memory_explained(model, config, head):
        pass
    monkeypatch.setattr(memory, "available_bytes", lambda device: most - 1)
    with (
        pytest.raises(ValueError, match=r"the KV cache of .* does not fit"),
        memory_explained(model, config, head),
    ):
        pass


def rewritten(source: Path, folder: Path, without: tuple[str, ...]) -> Path:
    """A copy whose index names all tensors, and whose file lacks those ``without``."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    kept = {name: each for name, each in tensors.items() if not name.startswith(without)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_head_that_only_the_index_names_is_none(
    random_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    """Copies of a model in other formats leave it out; some have the model's own index."""
    source, _ = random_of("glm4_moe")
    folder = rewritten(source, tmp_path / "without", ("model.layers.2.",))
    model = open_checkpoint(folder)
    assert dict(model.weights()).keys() == dict(open_checkpoint(source).weights()).keys()
    assert not has_mtp(model)
    with pytest.raises(CheckpointError, match="has no MTP head"):
        open_mtp(model)
    part = open_checkpoint(rewritten(source, tmp_path / "part", ("model.layers.2.mlp.gate.",)))
    for read in (open_mtp, lambda model: list(mtp_tensors(model))):
        with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\.mlp\.gate\."):
            read(part)  # type: ignore[operator]


def test_a_tied_matrix_of_the_output_layers_name_is_not_loaded_twice(
    random_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    source, _ = random_of("glm4_moe")
    folder = rewritten(source, tmp_path / "tied", ("model.embed_tokens.",))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = open_checkpoint(folder)
    embedding = load_file(source / "model.safetensors")["lm_head.weight"]
    assert torch.equal(dict(model.weights())["model.embed_tokens.weight"], embedding)
    head = open_mtp(model)
    assert head.output_layer() is None
    assert head.output_layer_bytes(torch.bfloat16) == 0


def test_a_checkpoint_without_a_head_or_a_part_of_it_is_refused_by_name(
    random_of: Callable[[str], tuple[Path, Any]],
    tiny_model: Callable[..., Path],
    start: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedModelError, match="qwen2 models have no MTP head"):
        open_mtp(open_checkpoint(tiny_model()))
    source, _ = random_of("glm4_moe")
    folder = tmp_path / "model"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    stored = load_file(source / "model.safetensors")
    first = "model.layers.2."

    def having(**changes: Tensor | None) -> None:
        changes = {first + name: each for name, each in changes.items()}
        tensors = {name: each for name, each in (stored | changes).items() if each is not None}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    for changes, message in (
        ({"enorm.weight": None}, "has no tensor model.layers.2.enorm.weight, which MTP heads have"),
        ({"eh_proj.weight": None}, "has no tensor model.layers.2.eh_proj.weight, which MTP heads"),
        ({"self_attn.o_proj.weight": None}, "has no tensor of model.layers.2.self_attn.o_proj"),
        ({"input_layernorm.weight": None}, "has no tensor model.layers.2.input_layernorm.weight"),
        ({"hnorm.weight": torch.ones(5)}, "hnorm.weight is not a norm's weight of 64 entries"),
        ({"eh_proj.weight": torch.ones(64, 64)}, "eh_proj is not a linear layer of 128 inputs"),
        ({"other.weight": torch.ones(5)}, "weights this architecture does not use"),
    ):
        having(**changes)
        with pytest.raises(CheckpointError, match=message):
            start(folder, mtp=True)
    # Without it the model is served as ever.
    tensors = {name: each for name, each in stored.items() if not name.startswith(first)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    start(folder)
    with pytest.raises(CheckpointError, match=r"no MTP head: no tensor's name begins with model.l"):
        start(folder, mtp=True)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="num_nextn_predict_layers is 0"):
        start(folder, mtp=True)


def test_settings_that_contradict_a_head_are_refused(
    random_of: Callable[[str], tuple[Path, Any]], start: Callable[..., Engine]
) -> None:
    folder, _ = random_of("glm4_moe")
    with pytest.raises(ValueError, match="is 'ngram', expected 'mtp' or 'auto' with an MTP head"):
        start(folder, mtp=True, speculate="ngram")
    with pytest.raises(ValueError, match="speculate is 'mtp', which needs the MTP head"):
        start(folder, speculate="mtp")


def test_by_itself_a_model_drafts_with_its_head_if_asked_and_with_auto(
    trained_of: Callable[[str], Path], tiny_model: Callable[..., Path]
) -> None:
    """The head of a model that is rounded to 4 bits is rounded too."""
    folder, params = trained_of("glm4_moe"), SamplingParams(temperature=0, max_tokens=20)
    options: dict[str, Any] = {
        "quantize": "nf4",
        "kv_cache_bytes": 1 << 22,
        "max_num_seqs": 2,
        "progress": False,
    }
    answers = []
    for speculate in ("off", "mtp", "auto"):
        with LLM(folder, speculate=speculate, **options) as model:
            (found,) = model.generate(["the quick brown fox"], params)
            answers.append(found.token_ids)
            assert model._engine.draft_method == (None if speculate == "off" else "mtp")
            if speculate == "mtp":
                assert model._engine.stats().draft_tokens > 10
                head = drafter_of(model._engine)._head._layer  # type: ignore[attr-defined]
                packed = list(head.packed_weights())
                assert len(packed) == 4
    assert answers[0] == answers[1] == answers[2]
    with LLM(tiny_model(), speculate="auto", **options) as model:
        assert model._engine.draft_method == "ngram"


def test_a_model_that_is_quantized_keeps_its_head(
    trained_of: Callable[[str], Path], start: Callable[..., Engine], tmp_path: Path
) -> None:
    quantize_checkpoint(
        trained_of("qwen3_5_text"), tmp_path / "q", format="gptq", group_size=32, progress=False
    )
    expected = asyncio.run(complete(start(tmp_path / "q"), "a", prompt(2, 26)))
    engine = start(tmp_path / "q", mtp=True)
    assert asyncio.run(complete(engine, "a", prompt(2, 26))) == expected
    assert engine.stats().draft_tokens > 10


def test_a_head_that_was_quantized_with_its_model_is_read_in_4_bits(
    random_of: Callable[[str], tuple[Path, Any]],
    start: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    """As other tools write it: all linear layers of the head too, the one that joins included."""
    source, _ = random_of("qwen3_5_text")
    folder = tmp_path / "q"
    quantize_checkpoint(source, folder, format="gptq", group_size=32, progress=False)
    stored = load_file(folder / "model.safetensors")
    written = writing_format("gptq", WriteOptions(group_size=32))
    for name in [name for name in stored if name.startswith("mtp.") and stored[name].ndim == 2]:
        weight = round_to_nearest(stored.pop(name), written)
        stored |= written.tensors(name.removesuffix(".weight"), weight)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    expected = asyncio.run(complete(start(folder), "a", prompt(2, 26)))
    engine = start(folder, mtp=True)
    assert asyncio.run(complete(engine, "a", prompt(2, 26))) == expected
    assert engine.stats().draft_tokens > 10
    head = drafter_of(engine)._head
    assert len(list(head._layer.packed_weights())) == 4  # type: ignore[attr-defined]
    sixteen = draft_bytes(open_mtp(open_checkpoint(source)), torch.bfloat16)
    assert draft_bytes(open_mtp(open_checkpoint(folder)), torch.bfloat16) < sixteen / 3
