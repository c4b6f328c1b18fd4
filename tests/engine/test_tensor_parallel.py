"""Several ranks give the tokens and the log probabilities of one, bit for bit.

The ranks of a size are started once for all tests of it. Each test loads a model with one rank and
with several, and asks both for the same.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import (
    AdapterConfig,
    Engine,
    EngineConfig,
    GrammarCompiler,
    Request,
    RequestOutput,
    SamplingParams,
)
from nybble.engine.head_drafter import HeadDrafter
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.model_drafter import ModelDrafter
from nybble.engine.parallel import TensorParallel
from nybble.engine.ranks import Ranks
from nybble.loaders import Checkpoint, open_checkpoint, save_packed
from nybble.loaders.mtp import open_mtp
from nybble.models import architecture_of
from nybble.quantizers import InFlight, quantize_checkpoint
from nybble.quantizers.gptq import GptqSettings

CPU = torch.device("cpu")
CONFIG = EngineConfig(block_size=4, max_num_seqs=6, max_batched_tokens=16, max_model_len=128)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    "olmoe": {**EXPERTS, "intermediate_size": 32},
    "olmo2": {},
    "cohere": {"use_qk_norm": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 24, "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0},
    "nemotron": {"hidden_act": "relu2"},
    # Fewer KV heads than ranks: several ranks have the same one.
    "llama": {"num_key_value_heads": 1, "vocab_size": 301},
    "olmo3": {"num_key_value_heads": 1, "sliding_window": 24},
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    torch.set_num_threads(1)
    found = Ranks([CPU] * request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def model(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a small model: of a format, of a family, or ``family in nf4``."""
    built: dict[str, Path] = {}

    def quantized(name: str) -> Path:
        folder = tmp_path_factory.mktemp("quantized") / "model"
        kind, _, detail = name.partition(" ")
        calibration = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
        act_order = detail == "act-order"
        quantize_checkpoint(
            tiny_model(),
            folder,
            format=kind,  # type: ignore[arg-type]
            group_size=32,
            calibration=calibration if act_order else None,
            settings=GptqSettings(desc_act=True) if act_order else None,
            progress=False,
        )
        return folder

    def of_family(name: str) -> Path:
        family, _, format = name.partition(" in ")
        folder = tmp_path_factory.mktemp("family") / family
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
        made = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for tensor in made.parameters():
                tensor.add_(0.2 * torch.randn(tensor.shape))
        made.to(torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model() / file, folder / file)
        if not format:
            return folder
        rounded = folder.with_name("rounded")
        quantize_checkpoint(folder, rounded, format="nf4", group_size=32, progress=False)
        return rounded

    def build(name: str) -> Path:
        if name == "16 bits":
            return tiny_model()
        if name not in built:
            is_family = name.partition(" ")[0] in FAMILIES
            built[name] = of_family(name) if is_family else quantized(name)
        return built[name]

    return build


def blocks_of(folder: Path, blocks: int, size: int, config: EngineConfig) -> int:
    """The bytes of so many blocks of the KV cache at each of ``size`` ranks."""
    part = TensorParallel(0, size).part_of(architecture_of(open_checkpoint(folder).config))
    return blocks * KVCacheLayout.of(part, config, 128).block_bytes


Asked = Sequence[tuple[Sequence[int], SamplingParams, str | None]]


def answers(
    folder: Path,
    ranks: Ranks | None,
    asked: Asked,
    *,
    blocks: int = 200,
    adapters: dict[str, Path] | None = None,
    adapter_slots: AdapterConfig | None = None,
    pattern: str | None = None,
    draft: Checkpoint | None = None,
    **settings: Any,
) -> tuple[list[Any], Engine]:
    """What each request gets, asked all at once, twice: at first and from the prefix cache."""
    size = 1 if ranks is None else ranks.group.size
    config = replace(CONFIG, **settings, adapters=adapter_slots, tensor_parallel_size=size)
    config = replace(config, kv_cache_bytes=blocks_of(folder, blocks, size, config))
    engine = Engine.load(open_checkpoint(folder), config, progress=False, ranks=ranks, draft=draft)
    for name, path in (adapters or {}).items():
        engine.load_adapter(name, str(path))
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    engine.start()

    async def one(name: str, prompt: Sequence[int], params: SamplingParams, use: str | None) -> Any:
        guide = None if pattern is None else compiler.regex(pattern)
        request = Request(name, tuple(prompt), params, guide, use)
        return seen([output async for output in engine.generate(request)])

    async def all_of_them() -> list[Any]:
        found = []
        for turn in "ab":
            each = [one(f"{turn}{index}", *request) for index, request in enumerate(asked)]
            found += await asyncio.gather(*each)
        return found

    try:
        return asyncio.run(all_of_them()), engine
    finally:
        engine.stop()


def seen(outputs: list[RequestOutput]) -> Any:
    """Everything of the outputs that a client sees, comparable."""
    read = [
        [array.tobytes() for array in vars(output.prompt_logprobs).values() if _is_array(array)]
        for output in outputs
        if output.prompt_logprobs is not None
    ]
    tokens = [(output.token_ids, output.text, output.logprobs) for output in outputs]
    return tokens, read, outputs[-1].finish_reason


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def asked(vocab: int = 290, adapters: Sequence[str | None] = (None,), tokens: int = 12) -> Asked:
    """Prompts of one step and of several, greedy, random, with penalties and with log
    probabilities."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index, length in enumerate((5, 40, 9, 17, 1, 30, 26, 12)):
        prompt = torch.randint(3, vocab, (length,), generator=generator).tolist()
        params = SamplingParams(
            max_tokens=tokens,
            temperature=0.8 if index % 3 == 2 else 0,
            seed=index,
            ignore_eos=True,
            logprobs=3 if index % 2 else None,
            prompt_logprobs=2 if index in (1, 3) else None,
            repetition_penalty=1.2 if index == 4 else 1.0,
        )
        found.append((prompt, params, adapters[index % len(adapters)]))
    return found


def assert_equal(folder: Path, ranks: Ranks, requests: Asked, **settings: Any) -> tuple[Any, Any]:
    """Returns the engines of one rank and of all, which have stopped."""
    expected, alone = answers(folder, None, requests, **settings)
    found, together = answers(folder, ranks, requests, **settings)
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == theirs, f"request {index}"
    return alone, together


@pytest.mark.parametrize(
    "name",
    [
        "gptq act-order",
        "qwen2_moe in nf4",
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("16 bits", "gptq", "awq", "nf4", "fp4", *FAMILIES, "gpt_oss in nf4")
            if name != "llama"
        ),
    ],
)
def test_tokens_and_logprobs_are_those_of_one_rank(
    model: Callable[[str], Path], ranks: Ranks, name: str
) -> None:
    assert_equal(model(name), ranks, asked())


def test_adapters_are_cut_along_their_outputs(
    model: Callable[[str], Path], tiny_adapter: Callable[..., Path], ranks: Ranks
) -> None:
    """Three adapters that change different layers go through two slots."""
    adapters = {
        "all": tiny_adapter(),
        "some": tiny_adapter(target_modules=["q_proj", "v_proj", "up_proj"], r=2, seed=1),
        "last": tiny_adapter(target_modules=["o_proj", "down_proj"], r=8, seed=2),
    }
    requests = asked(adapters=(None, "all", "some", "last"))
    slots = AdapterConfig(slots=2, max_rank=8)
    assert_equal(model("gptq act-order"), ranks, requests, adapters=adapters, adapter_slots=slots)


@pytest.mark.parametrize(
    ("tied", "dtype"),
    [
        (True, "int8"),
        *(pytest.param(tied, "auto", marks=pytest.mark.slow) for tied in (False, True)),
    ],
)
def test_adapters_own_tokens_and_ends_are_those_of_one_rank(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tiny_token_adapter: Callable[..., Path],
    ranks: Ranks,
    tied: bool,
    dtype: Any,
) -> None:
    """Of an odd number of tokens too; all of them through three slots, beside the base."""
    both, some = ["embed_tokens", "lm_head"], ["q_proj", "down_proj"]
    token_adapters = {
        "rows": tiny_token_adapter(tied=tied),
        "odd rows": tiny_token_adapter(tied=tied, rows=391),
        "matrices": tiny_token_adapter(tied=tied, modules_to_save=both),
        "LoRA": tiny_token_adapter(tied=tied, target_modules=["v_proj", *both]),
    }
    ends: dict[str, dict[str, Any]] = {
        "plain": {},
        "norms": {"modules_to_save": ["input_layernorm", "model.norm"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [9, 50], "lm_head": [7, 170, 17]}},
        "dora": {"target_modules": ["lm_head"], "use_dora": True},
    }
    adapters = token_adapters | {
        name: tiny_adapter(tied=tied, **{"target_modules": some, **options})
        for name, options in ends.items()
    }
    requests = []
    for index, (prompt, params, name) in enumerate(asked(adapters=(None, *adapters))):
        own = [320, 5, 321, 323] if name in token_adapters else []
        params = replace(params, temperature=3.0 if index % 2 else 0)
        requests.append(([*prompt, *own], params, name))
    requests.append(([3, 4], replace(requests[0][1], prompt_logprobs=2), list(adapters)[-1]))
    folder = tiny_model(tie_word_embeddings=tied)
    slots = AdapterConfig(slots=3, max_rank=8, dtype=dtype)
    settings: dict[str, Any] = {"adapters": adapters, "adapter_slots": slots}
    expected, _ = answers(folder, None, requests, **settings)
    assert any(token >= 320 for tokens, *_ in expected for ids, *_ in tokens for token in ids)
    found, _ = answers(folder, ranks, requests, **settings)
    for (_, _, name), mine, theirs in zip(requests * 2, found, expected, strict=True):
        assert mine == theirs, name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("olmo2", marks=pytest.mark.slow),  # a norm of all heads together
        "cohere",  # of each head
        pytest.param("olmo3", marks=pytest.mark.slow),  # several ranks have the same KV head
        pytest.param("qwen3", marks=pytest.mark.slow),  # the same of all heads
    ],
)
def test_changes_of_norms_of_heads_are_cut_with_the_heads(
    model: Callable[[str], Path], tiny_mtp: ModuleType, tmp_path: Path, ranks: Ranks, name: str
) -> None:
    folder = model(name)
    adapters = {}
    for seed, norms in enumerate((["k_norm"], ["q_norm", "k_norm"])):
        adapter = tiny_mtp.write_tiny_adapter(tmp_path / f"{seed}", folder, modules_to_save=norms)
        _shake(adapter, seed)
        adapters[f"{seed}"] = adapter
    requests = asked(adapters=(None, *adapters))
    slots = AdapterConfig(slots=2, max_rank=8)
    assert_equal(folder, ranks, requests, adapters=adapters, adapter_slots=slots)


@pytest.mark.parametrize(
    "name", ["gptq act-order", pytest.param("16 bits", marks=pytest.mark.slow)]
)
def test_gains_and_biases_of_adapters_are_cut_along_their_outputs(
    model: Callable[[str], Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    ranks: Ranks,
    name: str,
) -> None:
    """DoRA, (IA)³ and biases, on layers that are computed together and on single ones; through two
    slots beside a plain adapter. They change what is said."""
    kinds: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "dora on some": {"use_dora": True, "target_modules": ["k_proj", "v_proj", "up_proj"]},
        "dora and biases": {
            "use_dora": True,
            "bias": "all",
            "target_modules": ["q_proj", "o_proj"],
        },
        "lora_bias": {"lora_bias": True},
        "all": {"bias": "all", "target_modules": ["k_proj", "o_proj"]},
        "ia3": {"ia3": True},
        "ia3 on some": {"ia3": True, "target_modules": ["k_proj", "v_proj", "down_proj"]},
        "plain": {},
    }
    adapters = {}
    for seed, (kind, options) in enumerate(kinds.items()):
        folder = tmp_path / kind.replace(" ", "-")
        adapters[kind] = Path(shutil.copytree(tiny_adapter(seed=seed, **options), folder))
        _shake(folder, seed)
    requests = asked(adapters=(None, *adapters))
    slots = AdapterConfig(slots=2, max_rank=8)
    settings: dict[str, Any] = {"adapters": adapters, "adapter_slots": slots}
    alone, _ = answers(model(name), None, requests, **settings)
    together, _ = answers(model(name), ranks, requests, **settings)
    for (_, _, adapter), mine, theirs in zip(requests * 2, together, alone, strict=True):
        assert mine == theirs, adapter
    plain, _ = answers(model(name), None, [(p, params, None) for p, params, _ in requests])
    for (_, _, adapter), changed, base in zip(requests * 2, alone, plain, strict=True):
        assert (changed == base) == (adapter is None), adapter


def _shake(folder: Path, seed: int) -> None:
    """Make an adapter's magnitudes, factors, biases and norms far from the base's."""
    file = folder / "adapter_model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if any(part in name for part in ("magnitude", "ia3_l", "norm")):
            tensor *= 0.5 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith("bias"):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})


def test_preempted_sequences_go_on_as_with_one_rank(
    model: Callable[[str], Path], ranks: Ranks
) -> None:
    """Room for about 100 tokens of the 240 that eight requests have together."""
    alone, together = assert_equal(
        model("gptq act-order"), ranks, asked(tokens=24), blocks=25, kv_dtype="int8"
    )
    assert together.stats().preemptions == alone.stats().preemptions > 0


def test_drafts_and_grammars_change_nothing(model: Callable[[str], Path], ranks: Ranks) -> None:
    _, together = assert_equal(
        model("gptq act-order"),
        ranks,
        [(tuple(range(5, 25)) * 2, params, adapter) for _, params, adapter in asked()[:4]],
        speculate="ngram",
        pattern="(ab|cd|the )*",
    )
    assert together.stats().draft_tokens > 0


@pytest.mark.parametrize(
    "method",
    ["mtp", *(pytest.param(each, marks=pytest.mark.slow) for each in ("draft", "eagle3"))],
)
def test_the_first_rank_alone_drafts(
    tiny_model: Callable[..., Path],
    tiny_eagle3: Callable[..., Path],
    tiny_mtp: ModuleType,
    tmp_path: Path,
    ranks: Ranks,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head's keys and values take a part of every rank's cache."""
    folder = tiny_model()
    if method == "draft":
        draft: Checkpoint = open_checkpoint(tiny_model(seed=1, layers=1))
    elif method == "eagle3":
        draft = open_checkpoint(tiny_eagle3(tmp_path / "head", folder))
    else:
        folder = tmp_path / "model"
        tiny_mtp.write_tiny_mtp(folder)
        draft = open_mtp(open_checkpoint(folder))
    drafts: list[tuple[list[int], tuple[int, ...]]] = []
    for kind in (HeadDrafter, ModelDrafter):

        def recorded(self: Any, *given: Any, draft: Any = kind.draft) -> Any:
            found = draft(self, *given)
            drafts.extend((list(sequence.token_ids), d.tokens) for sequence, d in found.items())
            return found

        monkeypatch.setattr(kind, "draft", recorded)
    settings: dict[str, Any] = {
        "draft": draft,
        "speculate": "mtp" if method == "mtp" else "draft",
        "max_draft_tokens": 3,
    }
    expected, _ = answers(folder, None, asked())
    found, together = answers(folder, ranks, asked(), **settings)
    assert found == expected
    assert together.stats().draft_tokens > 30
    # One request at a time is drafted for as by one rank: with the whole output layer.
    drafts.clear()
    answers(folder, None, asked()[6:7], **settings)
    alone = list(drafts)
    drafts.clear()
    answers(folder, ranks, asked()[6:7], **settings)
    assert drafts == alone != []


def test_a_head_without_an_output_layer_uses_all_ranks_of_the_models(
    tiny_model: Callable[..., Path],
    tiny_eagle3: Callable[..., Path],
    tmp_path: Path,
    ranks: Ranks,
) -> None:
    folder = tiny_model()
    vocab = architecture_of(open_checkpoint(folder).config).vocab
    head = tiny_eagle3(tmp_path / "head", folder, vocab=vocab)
    stored = load_file(head / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, head / "model.safetensors", {"format": "pt"})
    draft = open_checkpoint(head)
    expected, _ = answers(folder, None, asked())
    found, together = answers(folder, ranks, asked(), draft=draft, speculate="draft")
    assert found == expected
    assert together.stats().draft_tokens > 30


@pytest.mark.slow
def test_a_packed_model_is_cut_where_it_lies(
    model: Callable[[str], Path], tmp_path: Path, ranks: Ranks
) -> None:
    source = InFlight(open_checkpoint(model("16 bits")), layers="nf4", head="int8")
    save_packed(source, tmp_path / "packed", layout="cpu_tiles", progress=False)
    assert_equal(tmp_path / "packed", ranks, asked())


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("16 bits", 4),
        pytest.param("cohere", 3, marks=pytest.mark.slow),  # attention and MLP side by side
        pytest.param("qwen2_moe", 5, marks=pytest.mark.slow),  # experts, and a shared one
        pytest.param("olmo2", 6, marks=pytest.mark.slow),  # norms of all queries, and of all keys
    ],
)
def test_what_is_gathered_in_each_layer_and_once_a_step(
    model: Callable[[str], Path],
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    calls: int,
) -> None:
    """What docs/scaling.md says of the gathers and of the bytes that a rank receives."""
    gathered: list[int] = []
    gather = TensorParallel.gather

    def counted(group: TensorParallel, own: torch.Tensor) -> torch.Tensor:
        gathered.append(own.numel() * own.itemsize)
        return gather(group, own)

    monkeypatch.setattr(TensorParallel, "gather", counted)
    prompt = (3, 4, 5)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    _, engine = answers(model(name), ranks, [(prompt, params, None)], prefix_caching=False)
    size, vocab = ranks.group.size, engine.vocab_size
    numbers = {
        # Heads, intermediate features, and what attention and MLP return: 4 · 32, 256, 128.
        "16 bits": 128 + 256 + 2 * 128,
        "cohere": 64 + 128 + 64,
        "qwen2_moe": 64 + (2 * 32 + 64) + 2 * 64,
        # Two KV heads, which two ranks of four have twice.
        "olmo2": 64 + 128 + 2 * 64 + 4 * 16 + max(2, size) * 16,
    }
    of_a_token = 2 * numbers[name] // size * 2  # layers, and 16 bits
    head = -(-vocab // size) * 2
    steps = [3 * of_a_token + head, of_a_token + head] * 2  # two turns of a prompt and a token
    assert len(gathered) == len(steps) * (2 * calls + 1)
    assert sum(gathered) == sum(steps)
