"""The references compute what transformers' models do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, XIELUActivation
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as gpt_oss_attention,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.stablelm.modeling_stablelm import apply_rotary_pos_emb as stablelm_rotary

from nybble.kernels import reference
from nybble.kernels.activation import Activation
from nybble.kernels.attention_batch import AttentionBatch

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@dtypes
@pytest.mark.parametrize(
    ("activation", "named"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("relu2", "relu2"),
    ],
)
def test_activations(activation: Activation, named: str, dtype: torch.dtype) -> None:
    gate, up = 4 * random(5, 128, dtype=dtype), random(5, 128, dtype=dtype)
    activated = ACT2FN[named](gate)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(reference.activate(gate, activation), activated, **tolerance)
    found = reference.gated(torch.cat((gate, up), dim=-1), activation)
    torch.testing.assert_close(found, activated * up, **tolerance)


@dtypes
def test_xielu(dtype: torch.dtype) -> None:
    theirs = XIELUActivation(0.7, 0.9, beta=0.3, eps=-0.1, dtype=torch.float32)
    numbers = {
        "alpha_p": float(nn.functional.softplus(theirs.alpha_p)),
        "alpha_n": float(theirs.beta + nn.functional.softplus(theirs.alpha_n)),
        "beta": float(theirs.beta),
        "eps": float(theirs.eps),
    }
    x = 4 * random(5, 128, dtype=dtype)
    found, expected = reference.xielu(x, **numbers), theirs(x.float()).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@dtypes
def test_llama_rounds_before_the_weight_gemma_and_olmo_after_it(dtype: torch.dtype) -> None:
    x, residual, weight = (random(n, 160, dtype=dtype) for n in (7, 7, 1))
    llama, gemma, olmo = (kind(160, 1e-5) for kind in (LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm))
    for norm, offset in ((llama, None), (gemma, 1.0), (olmo, 0.0)):
        norm.weight.data = weight[0]
        assert torch.equal(reference.rms_norm(x, weight[0], 1e-5, offset), norm(x))
        found, total = reference.add_rms_norm(x, residual, weight[0], 1e-5, offset)
        assert torch.equal(total, x + residual)
        assert torch.equal(found, norm(x + residual))


@dtypes
def test_layer_norms_with_and_without_a_bias(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (random(n, 160, dtype=dtype) for n in (7, 8, 1, 2))
    weight, bias, residual = weight[0], bias[1], residual[1:]
    nemotron, cohere = NemotronLayerNorm1P(160), CohereLayerNorm(160)
    nemotron.weight.data, nemotron.bias.data, cohere.weight.data = weight, bias, weight
    found = reference.layer_norm(x, weight + 1, bias, 1e-5)
    assert torch.equal(found, nemotron(x))
    found, total = reference.add_layer_norm(x, residual, weight, None, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(found, cohere(x + residual))


@dtypes
def test_a_layer_norm_may_have_a_weight_for_each_head(dtype: torch.dtype) -> None:
    x, weight = random(5, 4, 32, dtype=dtype), random(4, 32, dtype=dtype)
    cohere = CohereLayerNorm((4, 32))
    cohere.weight.data = weight
    assert torch.equal(reference.layer_norm(x, weight, None, 1e-5), cohere(x))


@pytest.mark.parametrize("family", ["llama", "stablelm", "glm", "cohere"])
def test_rotary(family: str) -> None:
    """Llama's halves, StableLM's of a part of the head, GLM's neighbours of a part, Cohere's."""
    tokens, dim = 5, 64
    rotary_dim = 32 if family in ("stablelm", "glm") else dim
    q, k, v = (random(tokens, heads, dim, dtype=torch.float32) for heads in (4, 2, 2))
    frequencies = random(tokens, rotary_dim // 2, dtype=torch.float32)
    angle = frequencies.repeat(1, 2)
    theirs = frequencies.repeat_interleave(2, dim=-1) if family == "cohere" else angle
    rotate = {
        "llama": llama_rotary,
        "stablelm": stablelm_rotary,
        "glm": glm_rotary,
        "cohere": cohere_rotary,
    }[family]
    # GLM's takes the whole head, StableLM's what is rotated.
    part = rotary_dim if family == "stablelm" else dim
    turned = rotate(
        q[None, ..., :part],
        k[None, ..., :part],
        theirs.cos()[None],
        theirs.sin()[None],
        unsqueeze_dim=2,
    )
    expected_q, expected_k = (
        torch.cat((new[0], old[..., part:]), dim=-1)
        for new, old in zip(turned, (q, k), strict=True)
    )
    caches = torch.zeros(2, 1, 2, 16, dim)
    slots = torch.tensor([3, 1, 0, 9, 15])
    interleaved = family in ("glm", "cohere")
    reference.rotary_store(
        q, k, v, angle.cos(), angle.sin(), *caches, slots, interleaved=interleaved
    )
    torch.testing.assert_close(q, expected_q)
    torch.testing.assert_close(caches[0, 0, :, slots].transpose(0, 1), expected_k)
    assert torch.equal(caches[1, 0, :, slots].transpose(0, 1), v)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_attention(family: str) -> None:
    """Gemma 2's capped logits and gpt-oss's sinks, of the last four of 20 tokens."""
    heads, kv_heads, dim, context, new = 6, 2, 32, 20, 4
    q = random(new, heads, dim, dtype=torch.float32)
    caches = random(2, 2, kv_heads, 16, dim, dtype=torch.float32)
    sinks = random(heads, dtype=torch.float32)
    batch = AttentionBatch(
        query_start=torch.tensor([0, new], dtype=torch.int32),
        context_lens=torch.tensor([context], dtype=torch.int32),
        block_tables=torch.tensor([[0, 1]], dtype=torch.int32),
        slot_mapping=torch.arange(context - new, context),
        max_query=new,
    )
    keys, values = (cache.transpose(0, 1).flatten(1, 2)[None, :, :context] for cache in caches)
    position = torch.arange(context)
    hidden = position[None] > position[-new:, None]
    mask = torch.zeros(new, context).masked_fill(hidden, float("-inf"))
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, sinks=sinks, training=False)
    inputs = module, q.transpose(0, 1)[None], keys, values, mask
    if family == "gemma2":
        expected, _ = gemma2_attention(*inputs, scaling=0.5, softcap=2.0)
        found = reference.paged_attention(q, *caches, batch, 0.5, softcap=2.0)
    else:
        expected, _ = gpt_oss_attention(*inputs, scaling=0.5)
        found = reference.paged_attention(q, *caches, batch, 0.5, sinks=sinks)
    torch.testing.assert_close(found, expected[0].flatten(1))
