"""Logits and greedy tokens equal those of transformers on the same weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.engine.decoder import Decoder
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.ops import AttentionBatch
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.models import architecture_of
from nybble.quantizers import InFlight, quantize_checkpoint

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def random_model(folder: Path, tokenizer_from: Path, family: str, **settings: Any) -> Path:
    """A folder with a small random model of any family the decoder computes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **settings,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def transformers_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Transformers' own model in float32, holding the checkpoint's dequantized weights."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in checkpoint.weights():
            for target, value in _parts(name, weight, parameters):
                parameters[target].copy_(value)
    return model.eval()


def _parts(
    name: str, weight: PackedWeight | DenseWeight | Tensor, parameters: dict[str, Any]
) -> list[tuple[str, Tensor]]:
    """A weight as transformers names it: fused projections cut into theirs."""
    if isinstance(weight, Tensor):
        return [(name, weight)]
    dense = weight.dequantize() if isinstance(weight, PackedWeight) else weight.weight
    parent, _, leaf = name.rpartition(".")
    names = {
        "qkv_proj": [f"{parent}.{p}_proj" for p in "qkv"],
        "gate_up_proj": [f"{parent}.{p}_proj" for p in ("gate", "up")],
    }.get(leaf, [name])
    sizes = [parameters[part + ".weight"].shape[0] for part in names]
    found = list(zip([n + ".weight" for n in names], dense.split(sizes), strict=True))  # type: ignore[no-untyped-call]
    if weight.bias is not None:
        found += zip([n + ".bias" for n in names], weight.bias.split(sizes), strict=True)  # type: ignore[no-untyped-call]
    return found


def our_logits(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``(tokens, vocab)`` of one prompt computed in one step."""
    tokens = len(ids)
    decoder = Decoder(
        architecture_of(checkpoint.config),
        checkpoint.weights(),
        device=torch.device("cpu"),
        dtype=dtype,
        max_model_len=tokens,
    )
    blocks = -(-tokens // 16)
    caches = [
        tuple(
            torch.zeros(
                2, blocks, layer.attention.kv_heads, 16, layer.attention.head_dim, dtype=dtype
            )
        )
        for layer in decoder.architecture.layers
    ]
    batch = AttentionBatch(
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        context_lens=torch.tensor([tokens], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        slot_mapping=torch.arange(tokens),
        max_query=tokens,
    )
    with torch.inference_mode():
        return decoder.logits(decoder.forward(ids, torch.arange(tokens), caches, batch))  # type: ignore[arg-type]


def assert_same_logits(checkpoint: Checkpoint) -> None:
    ids = torch.randint(0, 250, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers_model(checkpoint)(ids[None]).logits[0]
    error = (our_logits(checkpoint, ids, torch.float32) - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("rope", list(ROPE))
def test_rope_variants(tmp_path: Path, tiny_model: Callable[..., Path], rope: str) -> None:
    folder = random_model(tmp_path, tiny_model(), "llama", rope_parameters=ROPE[rope])
    assert_same_logits(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True}),
        ("mistral", {"sliding_window": 128}),
        ("mistral", {"sliding_window": 24}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 24}),
        ("qwen3", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 0}),
    ],
)
def test_families(
    tmp_path: Path, tiny_model: Callable[..., Path], family: str, settings: dict[str, object]
) -> None:
    assert_same_logits(open_checkpoint(random_model(tmp_path, tiny_model(), family, **settings)))


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Callable[[str], Checkpoint]:
    def build(format: str) -> Checkpoint:
        if format == "nf4 in flight, 8-bit head":
            return InFlight(open_checkpoint(tiny_model()), layers="nf4", head="int8")
        folder = tmp_path_factory.mktemp("quantized") / format
        quantize_checkpoint(tiny_model(), folder, format=format, group_size=64, progress=False)  # type: ignore[arg-type]
        return open_checkpoint(folder)

    return build


@pytest.mark.parametrize("format", ["gptq", "awq", "nf4", "nf4 in flight, 8-bit head"])
def test_quantized_checkpoints_give_the_logits_and_64_greedy_tokens(
    quantized: Callable[[str], Checkpoint], format: str
) -> None:
    checkpoint = quantized(format)
    assert_same_logits(checkpoint)
    model = transformers_model(checkpoint)
    config = EngineConfig(dtype=torch.float32, kv_cache_bytes=1 << 22, max_batched_tokens=64)
    engine = Engine.load(checkpoint, config, progress=False)
    engine.start()

    async def ours(ids: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
        request = Request("r", tuple(ids), params)
        return [t async for output in engine.generate(request) for t in output.token_ids]

    try:
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, 250, (5 + 30 * seed,), generator=generator).tolist()
            assert asyncio.run(ours(ids)) == _greedy(model, ids, 64)
    finally:
        engine.stop()


def _greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    found = model.generate(  # type: ignore[operator]
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(found[0, len(ids) :].tolist())


def test_bfloat16_kernels_stay_within_the_rounding_of_bfloat16(
    quantized: Callable[[str], Checkpoint],
) -> None:
    """Compared with float32 arithmetic on the same weights, no worse than 1.5 × transformers'."""
    checkpoint = quantized("gptq")
    ids = torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(1))
    model = transformers_model(checkpoint)
    with torch.no_grad():
        exact = model(ids[None]).logits[0]
        theirs = model.to(torch.bfloat16)(ids[None]).logits[0].float()
    ours = our_logits(checkpoint, ids, torch.bfloat16)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_a_checkpoint_without_a_head_needs_tied_embeddings(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_model(tie_word_embeddings=True), tmp_path / "m"))
    assert_same_logits(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="no lm_head"):
        our_logits(open_checkpoint(folder), torch.tensor([1]), torch.float32)
