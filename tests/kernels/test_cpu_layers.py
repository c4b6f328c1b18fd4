"""Whole decoder layers in one call compute what the kernels do one by one, to the bit.

tests/engine/test_fused_layers.py compares them by families, with the kernels of this machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.cpu.library import CpuLibrary
from nybble.kernels.decoder_layer import DecoderLayer, ExpertMlps, GatedMlp, RmsNorm
from nybble.kernels.packed import PackedWeight
from nybble.models import Router

from .cpu_kernels import compiled, random_weight

HIDDEN, HEADS, KV_HEADS, DIM, MLP, BLOCK = 96, 4, 2, 32, 64, 16


def random_layer(window: int, *, mixture: bool) -> DecoderLayer:
    def weight(out: int, columns: int, kind: str, *, act_order: bool = False) -> PackedWeight:
        made = random_weight(out, columns, 32, kind, torch.half, act_order=act_order, bias=True)
        return replace(made, scales=made.scales / 16).to_layout("cpu_tiles")

    def norm(width: int, offset: float | None = None) -> RmsNorm:
        return RmsNorm(torch.rand(width).bfloat16(), 1e-6, offset)

    def mlp(kind: str) -> GatedMlp:
        return GatedMlp(weight(2 * MLP, HIDDEN, kind), "gelu_tanh", weight(HIDDEN, MLP, kind))

    def experts() -> ExpertMlps:
        return ExpertMlps(
            router=torch.randn(6, HIDDEN),
            router_bias=torch.randn(6),
            routing=Router("gate", scoring="sigmoid", renormalize=True, groups=3, topk_groups=2),
            correction_bias=torch.rand(6),
            top_k=3,
            gate_up=[weight(2 * MLP, HIDDEN, "asym", act_order=True) for _ in range(6)],
            activation="silu",
            down=[weight(HIDDEN, MLP, "codebook") for _ in range(6)],
            shared=mlp("sym"),
        )

    return DecoderLayer(
        attention_norm=norm(HIDDEN),
        qkv=weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, "codebook"),
        q_norm=norm(DIM),
        k_norm=norm(DIM, 1.0),
        output=weight(HIDDEN, HEADS * DIM, "sym", act_order=True),
        post_attention_norm=norm(HIDDEN, 1.0),
        mlp_norm=norm(HIDDEN),
        mlp=experts() if mixture else mlp("asym"),
        post_mlp_norm=None,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=DIM**-0.5,
        window=window,
        softcap=20.0,
        sinks=torch.randn(HEADS),
        interleaved=False,
    )


def one_by_one(
    cpu: CpuLibrary,
    layer: DecoderLayer,
    added: Tensor | None,
    residual: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, ...],
    batch: AttentionBatch,
) -> tuple[Tensor, Tensor]:
    def norm(by: RmsNorm | None, x: Tensor) -> Tensor:
        return x if by is None else cpu.rms_norm(x, by.weight, by.eps, by.offset)

    def add_norm(by: RmsNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        return cpu.add_rms_norm(x, residual, by.weight, by.eps, by.offset)

    def multiply(weight: object, x: Tensor) -> Tensor:
        assert isinstance(weight, PackedWeight)
        return cpu.packed_matmul(x, weight)

    if added is None:
        x = norm(layer.attention_norm, residual)
    else:
        x, residual = add_norm(layer.attention_norm, added)
    q, k, v = multiply(layer.qkv, x).view(len(x), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    q, k = norm(layer.q_norm, q).contiguous(), norm(layer.k_norm, k).contiguous()
    cpu.rotary_store(q, k, v, *rotary, *cache[:2], batch.slot_mapping, *cache[2:])
    attended = cpu.paged_attention(
        q, *cache[:2], batch, layer.scale, layer.window, *cache[2:],
        softcap=layer.softcap, sinks=layer.sinks,
    )  # fmt: skip
    x, residual = add_norm(
        layer.mlp_norm, norm(layer.post_attention_norm, multiply(layer.output, attended))
    )

    def dense(mlp: GatedMlp) -> Tensor:
        return multiply(mlp.down, cpu.gated(multiply(mlp.gate_up, x), mlp.activation))

    if isinstance(layer.mlp, GatedMlp):
        return norm(layer.post_mlp_norm, dense(layer.mlp)), residual
    mlp = layer.mlp
    logits = cpu.router_logits(x, mlp.router, mlp.router_bias)
    ids, factors = cpu.choose_experts(mlp.routing, logits, mlp.top_k, mlp.correction_bias)
    up = cpu.grouped_linear(mlp.gate_up, torch.bfloat16)(x, ids, None)
    down = cpu.grouped_linear(mlp.down, torch.bfloat16)
    out = down(cpu.gated(up, mlp.activation), ids, factors)
    if mlp.shared is not None:
        out = out + dense(mlp.shared)
    return norm(layer.post_mlp_norm, out), residual


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (21, 1)])
def test_layers_in_one_call(
    cpu: CpuLibrary,
    lengths: tuple[int, ...],
    int8: bool,
    bits: Literal[8, 16],
    request: pytest.FixtureRequest,
) -> None:
    if bits == 8:
        cpu = compiled(request.node.callspec.params["cpu"], 8)
    torch.manual_seed(0)
    tokens, blocks = sum(lengths), 2 * len(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = AttentionBatch(
        query_start=starts,
        context_lens=torch.tensor(lengths, dtype=torch.int32) + 5,
        block_tables=torch.randperm(blocks).int().view(len(lengths), 2),
        slot_mapping=torch.randperm(blocks * BLOCK)[:tokens],
        max_query=max(lengths),
    )
    layers = [random_layer(0, mixture=False), random_layer(7, mixture=True)]
    shape = blocks, KV_HEADS, BLOCK, DIM

    def cache() -> tuple[Tensor, ...]:
        if int8:
            keys, values = torch.randint(-127, 128, (2, *shape), dtype=torch.int8)
            return keys, values, *torch.rand(2, *shape[:-1])
        return tuple(torch.randn(2, *shape).bfloat16())

    caches = [cache() for _ in layers]
    copies = [tuple(each.clone() for each in one) for one in caches]
    angles = torch.randn(tokens, DIM)
    rotary = angles.cos(), angles.sin()
    kernel = cpu.decoder_layers(layers, torch.bfloat16)
    assert kernel is not None
    for begin in (None, torch.randn(tokens, HIDDEN).bfloat16()):
        residual = torch.randn(tokens, HIDDEN).bfloat16()
        found = kernel(begin, residual, [rotary] * 2, caches, [batch] * 2)
        assert found is not None
        added = begin
        for layer, one in zip(layers, copies, strict=True):
            added, residual = one_by_one(cpu, layer, added, residual, rotary, one, batch)
        assert added is not None
        assert added.isfinite().all()
        assert torch.equal(found[0], added)
        assert torch.equal(found[1], residual)
        for one, copy in zip(caches, copies, strict=True):
            assert all(map(torch.equal, one, copy))
