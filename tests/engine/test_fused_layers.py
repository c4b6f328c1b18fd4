"""Layers in one call are to the bit what their parts compute, whatever the family and the step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.engine import EngineConfig
from nybble.engine.adapter_cache import AdapterVersion
from nybble.engine.adapter_slots import AdapterSlots
from nybble.engine.decoder import Decoder
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.parts import Block, FusedLayers, Step
from nybble.engine.request import Request, SamplingParams
from nybble.engine.runner import ModelRunner
from nybble.engine.scheduler import ScheduledSequence
from nybble.engine.sequence import BlockTable, Sequence
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.decoder_layers import DecoderLayers
from nybble.kernels.cpu.library import library
from nybble.kernels.lora import LoRASlots
from nybble.kernels.lora_batch import LoRABatch
from nybble.loaders import LoRAAdapter, open_checkpoint
from nybble.loaders.adapter import LoRAModule
from nybble.models import architecture_of
from nybble.quantizers.in_flight import InFlight

pytestmark = pytest.mark.skipif(library() is None, reason="needs the C++ kernels")

CONFIG = EngineConfig(block_size=16, max_num_seqs=4, max_batched_tokens=128)

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "pad_token_id": 0}
# What each family has beside Llama's layers, and how many calls its six layers become.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({}, 1),
    "qwen2": ({}, 1),  # biases
    "qwen3": ({"head_dim": 32}, 1),  # norms of heads
    "gemma3_text": ({"head_dim": 32, "sliding_window": 16}, 1),  # norms after, offsets, windows
    "gemma2": ({"head_dim": 32, "sliding_window": 16}, 1),  # softcaps
    "phi3": ({"pad_token_id": 0}, 1),  # fused projections
    "glm4": ({"head_dim": 32, "pad_token_id": 0}, 1),  # pairs rotated
    "smollm3": ({"pad_token_id": 0}, 1),  # layers without positions
    "mixtral": ({"num_local_experts": 4}, 1),
    "qwen3_moe": ({"head_dim": 32, **MOE}, 1),
    "glm4_moe": (  # a dense layer first, shared experts, sigmoids with a bias
        {"head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, **MOE},
        1,
    ),
    "qwen2_moe": (MOE, 0),  # a gate of the shared expert
    "granite": ({"residual_multiplier": 0.5}, 0),
    "olmo2": ({}, 0),  # no norm before
    "starcoder2": ({}, 0),  # LayerNorms
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def build(family: str) -> Path:
        options, _ = FAMILIES[family]
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family,
            **{
                "vocab_size": 320,
                "hidden_size": 128,
                "intermediate_size": 192,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                **options,
            },
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    return build


def decoder_of(folder: Path, captures: tuple[int, ...] = ()) -> Decoder:
    checkpoint = open_checkpoint(folder)
    return Decoder(
        architecture_of(checkpoint.config),
        InFlight(checkpoint, layers="nf4").weights(),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        max_model_len=256,
        captures=captures,
    )


def adapters_of(decoder: Decoder) -> AdapterSlots:
    """Two adapters, of different ranks and layers."""
    architecture = decoder.architecture
    slots = AdapterSlots(
        architecture, count=2, max_rank=8, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    torch.manual_seed(1)
    for slot, rank in enumerate((8, 3)):
        modules = {
            name: LoRAModule(torch.randn(rank, each.inputs), torch.randn(each.out, rank), 0.1)
            for name, each in architecture.linears.items()
            if slot == 0 or "layers.1." not in name
        }
        slots.fill(slot, slots.stage(LoRAAdapter(modules, bytes([slot]))))
    return slots


def steps(
    decoder: Decoder,
    kv_dtype: Literal["auto", "int8", "fp8"],
    adapters: AdapterSlots | None = None,
    used: tuple[int | None, int | None] = (None, None),
) -> list[Tensor]:
    """Logits of a prompt, of its rest beside another, and of one token of each.

    used: the slots of the two sequences' adapters.
    """
    config = replace(CONFIG, kv_dtype=kv_dtype)
    layout = KVCacheLayout.of(decoder.architecture, config, 256)
    runner = ModelRunner(decoder, config, layout, 16 * len(layout.groups), adapters)
    sequences = []
    for number, length in enumerate((60, 33)):
        prompt = tuple(range(40 + number, 40 + number + length))
        request = Request("r", prompt, SamplingParams())
        one = Sequence(request, 1, None, None)  # type: ignore[arg-type]
        if (slot := used[number]) is not None:
            one.adapter = AdapterVersion("a", Path("a"), b"a", 8, 1, slot=slot)
        one.block_tables = tuple(
            BlockTable([8 * number + n + 16 * group for n in range(8)])
            for group in range(len(layout.groups))
        )
        sequences.append(one)
    found = []
    with torch.inference_mode():
        for counts in ((30, 0), (29, 32), (1, 1)):
            batch = [(one, count) for one, count in zip(sequences, counts, strict=True) if count]
            found.append(runner.run([ScheduledSequence.of(*each) for each in batch]).clone())
            for one, count in batch:
                one.num_computed_tokens += count
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_one_call(folder_of: Callable[[str], Path], family: str) -> None:
    decoder = decoder_of(folder_of(family))
    calls = [block for block in decoder._blocks[0] if isinstance(block, FusedLayers)]
    assert len(calls) == FAMILIES[family][1]
    if not calls:
        return
    assert len(decoder._blocks[0]) == 1
    parts: list[Block] = list(calls[0].blocks)
    assert len(parts) == 12
    kv_dtypes: tuple[Literal["auto", "int8"], ...] = ("auto", "int8")
    for kv_dtype in kv_dtypes:
        decoder._blocks = [[calls[0]]]
        together = steps(decoder, kv_dtype)
        decoder._blocks = [parts]
        assert all(map(torch.equal, steps(decoder, kv_dtype), together))
        assert all(logits.isfinite().all() for logits in together)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text"])
def test_layers_with_adapters_in_one_call(folder_of: Callable[[str], Path], family: str) -> None:
    decoder = decoder_of(folder_of(family))
    ((whole,),) = decoder._blocks
    assert isinstance(whole, FusedLayers)
    called = Counted(whole.kernel)
    adapters = adapters_of(decoder)
    plain = steps(decoder, "auto")
    for used in ((0, 1), (None, 0), (1, None), (1, 1)):
        decoder._blocks = [[replace(whole, kernel=called)]]
        together = steps(decoder, "auto", adapters, used)
        decoder._blocks = [list(whole.blocks)]
        apart = steps(decoder, "auto", adapters, used)
        assert all(map(torch.equal, apart, together))
        for row, slot in enumerate(used):
            assert torch.equal(together[-1][row], plain[-1][row]) == (slot is None)
    assert called.calls == 4 * 3


def test_adapters_of_other_layers_are_refused(folder_of: Callable[[str], Path]) -> None:
    decoder = decoder_of(folder_of("llama"))
    ((whole,),) = decoder._blocks
    assert isinstance(whole, FusedLayers)
    kernel, slots = whole.kernel, [LoRASlots.empty(1, 128, (0, 128), 8, torch.bfloat16, "cpu")] * 24
    lora = LoRABatch.of([0, -1], "cpu")
    assert isinstance(kernel, DecoderLayers)
    with pytest.raises(ValueError, match=r"adapters in \[\(128, 128\), "):
        kernel._fields_of_adapters(2, slots, lora)
    with pytest.raises(ValueError, match=r"slots: torch.int32 \(2,\)"):
        kernel._fields_of_adapters(3, slots, lora)


def test_what_is_captured_between_calls_is_what_the_parts_compute(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 2, 3 and the output of the last; the logits stay what they were."""
    folder = folder_of("qwen2")
    whole = steps(decoder_of(folder), "auto")
    decoder = decoder_of(folder, captures=(2, 3, 6))
    calls = [blocks[0] for blocks in decoder._blocks if blocks]
    assert all(isinstance(call, FusedLayers) for call in calls)
    assert list(map(len, decoder._blocks)) == [1, 1, 1, 0]
    found: list[list[Tensor]] = []
    forward = decoder.forward

    def keeping(*given: Any) -> Tensor:
        hidden = forward(*given)
        found[-1] += [each.clone() for each in given[-1]] + [hidden]
        return hidden

    monkeypatch.setattr(decoder, "forward", keeping)
    for blocks in (decoder._blocks, [list(call.blocks) for call in calls] + [[]]):  # type: ignore[union-attr]
        found.append([])
        decoder._blocks = blocks
        assert all(map(torch.equal, steps(decoder, "auto"), whole))
    together, by_part = found
    assert len(together) == 3 * 4
    assert all(map(torch.equal, together, by_part))
    for place in (0, 4, 8):
        captured, hidden = together[place : place + 3], together[place + 3]
        assert torch.equal(captured[2], hidden)
        assert not torch.equal(captured[0], captured[1])


class Counted:
    """A kernel or a block, and how often it was called."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


def test_the_parts_compute_what_the_kernel_does_not_take(
    folder_of: Callable[[str], Path],
) -> None:
    """Caches in fp8, and rows whose adapters have gains or norms."""
    decoder = decoder_of(folder_of("llama"))
    ((whole,),) = decoder._blocks
    assert isinstance(whole, FusedLayers)
    blocks = tuple(map(Counted, whole.blocks))
    kernel = Counted(whole.kernel)
    decoder._blocks = [[replace(whole, kernel=kernel, blocks=blocks)]]
    in_fp8 = steps(decoder, "fp8")
    assert [block.calls for block in blocks] == [len(in_fp8)] * 12
    steps(decoder, "auto")
    assert [block.calls for block in blocks] == [len(in_fp8)] * 12
    called = kernel.calls
    adapters = SimpleNamespace(only_low_rank=lambda projections: None)
    step = Step([], [], [], [], adapters=adapters)  # type: ignore[arg-type]
    one = replace(whole, kernel=kernel, blocks=(lambda added, residual, step: (added, residual),))  # type: ignore[arg-type]
    x = torch.zeros(1, 128)
    assert one(x, x, step) == (x, x)
    assert kernel.calls == called


def test_tensors_that_the_kernel_would_misread_are_named(
    folder_of: Callable[[str], Path],
) -> None:
    decoder = decoder_of(folder_of("llama"))
    ((whole,),) = decoder._blocks
    assert isinstance(whole, FusedLayers)
    x, turns = torch.zeros(2, 128).bfloat16(), (torch.zeros(2, 32), torch.zeros(2, 32))
    cache = torch.zeros(2, 3, 2, 16, 32).bfloat16()
    batch = AttentionBatch(
        query_start=torch.tensor([0, 2], dtype=torch.int32),
        context_lens=torch.tensor([2], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.tensor([0, 1]),
        max_query=2,
    )

    def call(x: Tensor = x, turns: Any = turns, cache: Tensor = cache, batch: Any = batch) -> Any:
        return whole.kernel(None, x, [turns] * 6, [tuple(cache)] * 6, [batch] * 6)

    assert call() is not None
    for wrong, named in (
        ({"x": x[:, :112]}, "x: torch.bfloat16 (2, 112)"),
        ({"x": x.float()}, "x: torch.float32"),
        ({"turns": (turns[0][:1], turns[1])}, "cos: torch.float32 (1, 32)"),
        ({"turns": (turns[0].double(), turns[1].double())}, "cos: torch.float64"),
        ({"cache": cache[..., :16]}, "k_cache: torch.bfloat16 (3, 2, 16, 16)"),
        ({"cache": cache[:, :, :1]}, "k_cache: torch.bfloat16 (3, 1, 16, 32)"),
        ({"cache": cache.transpose(2, 3).contiguous().transpose(2, 3)}, "k_cache"),
        (
            {"batch": replace(batch, slot_mapping=torch.tensor([0]))},
            "slot_mapping: torch.int64 (1,)",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            call(**wrong)
