"""How a model is cut for several ranks: their parts together are the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nybble.engine import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.parallel import ALONE, TensorParallel
from nybble.engine.ranks import check_ranks
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.layout import Layout
from nybble.loaders import Checkpoint, open_checkpoint
from nybble.models import Architecture, architecture_of
from nybble.quantizers import InFlight

SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def architecture(family: str = "llama", **options: Any) -> Architecture:
    return architecture_of(AutoConfig.for_model(family, **SIZES | options))


@pytest.mark.parametrize("size", [2, 4, 12])
def test_every_output_is_some_ranks_and_only_shared_kv_heads_are_of_several(size: int) -> None:
    whole = architecture()
    owners: dict[str, list[int]] = {}
    for rank in range(size):
        for name, ranges in TensorParallel(rank, size).outputs(whole).items():
            owners.setdefault(name, []).extend(
                i for first, last in ranges for i in range(first, last)
            )
    linears = {name: linear.out for name, linear in whole.linears.items()}
    for name, out in (linears | {whole.head: whole.vocab}).items():
        copies = max(1, size // 4) if name.endswith(("k_proj", "v_proj")) else 1
        assert sorted(owners[name]) == sorted([*range(out)] * copies)


def test_a_part_has_the_outputs_of_its_rank_and_all_inputs() -> None:
    part = TensorParallel(1, 4).part_of(architecture())
    (layer,) = part.layers
    (mixer,) = layer.mixers
    assert (mixer.heads, mixer.kv_heads) == (3, 1)
    sizes = {linear.leaf: (linear.out, linear.inputs) for linear in layer.linears}
    assert sizes["q_proj"] == (48, 96)
    assert sizes["v_proj"] == (16, 96)
    assert sizes["o_proj"] == (24, 192)
    assert sizes["up_proj"] == (48, 96)
    assert sizes["down_proj"] == (24, 192)
    assert (part.hidden, part.vocab) == (96, 300)
    assert ALONE.part_of(part) is part


def test_a_fused_projection_is_cut_in_each_of_its_parts() -> None:
    """Phi-3 stores queries, keys and values in one weight, and gate and up in another."""
    ranges = TensorParallel(1, 2).outputs(architecture("phi3", pad_token_id=0))
    layer = "model.layers.0."
    assert ranges[layer + "self_attn.qkv_proj"] == [(96, 192), (224, 256), (288, 320)]
    assert ranges[layer + "mlp.gate_up_proj"] == [(96, 192), (288, 384)]


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (5, {}, r"does not divide the model's 12 attention heads .*these do: 2, 3, 4, 6, 12$"),
        (6, {}, "has 4 KV heads: one must divide the other"),
        (4, {"intermediate_size": 194}, "the model's 194 intermediate features"),
        (12, {"vocab_size": 13}, "too many for a vocabulary of 13 tokens"),
    ],
)
def test_a_size_that_does_not_fit_the_model_is_refused_by_name(
    size: int, options: dict[str, int], said: str
) -> None:
    config = EngineConfig(tensor_parallel_size=size)
    with pytest.raises(ValueError, match=f"tensor_parallel_size is {size}, .*{said}"):
        check_ranks(architecture(**options), config)


def test_a_hidden_size_that_the_ranks_do_not_divide_is_refused() -> None:
    odd = replace(architecture(), hidden=98)
    with pytest.raises(ValueError, match="which does not divide the model's 98 hidden features"):
        check_ranks(odd, EngineConfig(tensor_parallel_size=4))


def test_ranks_that_fail_cannot_begin_again() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2, .*on_engine_failure 'exit'"):
        EngineConfig(tensor_parallel_size=2, restarts=1)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.engine.ranks.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(architecture(), EngineConfig(device="cuda:0", tensor_parallel_size=2))
    for device, said in (("cuda:0", r"2 GPU\(s\): each"), ("cuda:1", r"1 GPU\(s\) from cuda:1 on")):
        with pytest.raises(ValueError, match=f"tensor_parallel_size is 4, .* has {said}"):
            check_ranks(architecture(), EngineConfig(device=device, tensor_parallel_size=4))


@pytest.mark.parametrize("layout", ["rows", "cpu_tiles", "gpu_tiles", "gpu_gated_tiles"])
@pytest.mark.parametrize("ranges", [[(64, 128)], [(0, 64), (128, 192)], [(8, 24), (40, 56)]])
def test_outputs_of_a_packed_weight_keep_their_values_in_every_layout(
    layout: Layout, ranges: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    weight = PackedWeight(
        qweight=torch.randint(0, 256, (192, 64), dtype=torch.uint8),
        scales=torch.rand(192, 4),
        zeros=torch.rand(192, 4) * 15,
        levels=torch.arange(16, dtype=torch.float32),
        out_features=192,
        in_features=128,
        group_size=32,
        perm=torch.randperm(128).int(),
        bias=torch.rand(192),
    )
    cut = weight.to_layout(layout).outputs(ranges)
    rows = torch.cat([torch.arange(*each) for each in ranges])
    assert cut.layout == layout
    assert torch.equal(cut.dequantize(), weight.dequantize()[rows])
    assert weight.bias is not None
    assert cut.bias is not None
    assert torch.equal(cut.bias, weight.bias[rows])


@pytest.mark.parametrize("format", ["16 bits", "nf4"])
def test_every_weight_of_a_rank_says_of_how_many_outputs_it_is_a_part(
    tiny_model: Callable[..., Path], format: str
) -> None:
    """By which a GPU's kernels add as one rank does, if their order is fixed."""
    source: Checkpoint = open_checkpoint(tiny_model())
    if format == "nf4":
        source = InFlight(source, layers="nf4")
    found = []
    for group in (ALONE, TensorParallel(1, 2)):
        decoder = Decoder(
            architecture_of(source.config),
            source.weights(),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            max_model_len=64,
            group=group,
        )
        found.append([*(w for each in decoder._weights for w in each), decoder._head_weight])
    whole, part = found
    assert {weight.part_of for weight in whole} == {0}
    assert [weight.part_of for weight in part] == [weight.out_features for weight in whole]


def test_one_range_of_a_mapped_weight_stays_where_it_is(tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model())
    whole = dict(checkpoint.weights())
    own = dict(TensorParallel(1, 2).own_weights(architecture_of(checkpoint.config), whole.items()))
    name = "model.layers.0.self_attn.o_proj"
    found, before = own[name], whole[name]
    assert isinstance(found, DenseWeight)
    assert isinstance(before, DenseWeight)
    assert found.weight.data_ptr() == before.weight[64:].data_ptr()
    assert torch.equal(found.weight, before.weight[64:])
