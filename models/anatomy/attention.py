"""Attention of a decoder layer, as data: with keys and values a head, or latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nybble.models.anatomy.linears import LinearGroup, Rope


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention.

    window: tokens one sees, itself included; 0 for all before it.
    rope: None for a layer without positions.
    scale: what scores are multiplied by.
    qk_norm: of queries and keys: ``head`` norms every head by itself, ``each`` too with weights of
        its own, ``all`` norms all heads together. Biases are not added.
    q_norm, k_norm: the modules that hold their weights.
    softcap: scores become ``softcap · tanh(score / softcap)``.
    rotate_first: whether queries and keys are rotated before they are normed, not after.
    sinks: a tensor ``(heads,)`` of scores that take part in each head's softmax and have no value
        (Xiao et al. 2023); None for none.
    gated: whether the layer that computes queries computes a gate after each head's query, as wide
        as the head; what the head attends to is multiplied by the gate's sigmoid.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv: LinearGroup
    output: LinearGroup
    scale: float
    rope: Rope | None
    window: int = 0
    qk_norm: Literal["head", "each", "all"] | None = None
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    softcap: float | None = None
    rotate_first: bool = False
    sinks: str | None = None
    gated: bool = False

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        return (self.qkv, self.output)

    @property
    def cache_tensors(self) -> int:
        """How many tensors hold what is cached of a token: keys, and values."""
        return 2

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors other than those of norms and linear layers."""
        return () if self.sinks is None else (self.sinks,)

    @property
    def norms(self) -> tuple[str, ...]:
        """The modules with norms' weights."""
        return () if self.qk_norm is None else (self.q_norm, self.k_norm)

    def norm_shape(self, heads: int) -> tuple[int, ...]:
        """Of the weight of queries' or keys' norm, for as many heads."""
        shapes = {
            "head": (self.head_dim,),
            "each": (heads, self.head_dim),
            "all": (heads * self.head_dim,),
        }
        return shapes[self.qk_norm] if self.qk_norm is not None else ()


@dataclass(frozen=True)
class LatentAttention:
    """Causal multi-head latent attention (MLA; DeepSeek-AI 2024, "DeepSeek-V2").

    Of a token one latent is cached, which all heads share: normed, ``latent_dim`` wide. A head's
    key is ``key_dim`` entries that ``expand`` computes from it, behind ``rope.rotary_dim`` entries
    that are rotated and the same for all heads; its value is computed from the latent alone.

    The keys are never computed: a head's query is multiplied by its rows of ``expand`` instead,
    and what it attends to are latents ("absorbed" weights). So attention is that of ``heads``
    query heads that share one key head, whose leading entries are rotated.

    input: computes the queries, or what they are computed from, and then ``latent_dim`` entries of
        the latent and those of the key that are rotated.
    query: computes the queries from the normed output of ``input``; None if that computes them. Of
        a head, ``key_dim`` entries come first and those that are rotated last.
    expand: for each head ``key_dim`` rows, and then ``value_dim``.
    query_norm, latent_norm: the modules of their norms' weights. norm_eps: the epsilon of both.
    """

    heads: int
    latent_dim: int
    key_dim: int
    value_dim: int
    input: LinearGroup
    query: LinearGroup | None
    expand: LinearGroup
    output: LinearGroup
    scale: float
    rope: Rope
    norm_eps: float
    query_norm: str = "self_attn.q_a_layernorm"
    latent_norm: str = "self_attn.kv_a_layernorm"
    window: int = 0

    @property
    def kv_heads(self) -> int:
        """In the cache."""
        return 1

    @property
    def head_dim(self) -> int:
        """Entries of a token in the cache: the rotated ones, then the latent."""
        return self.rope.rotary_dim + self.latent_dim

    @property
    def cache_tensors(self) -> int:
        """How many tensors hold what is cached of a token: values are part of the keys."""
        return 1

    @property
    def query_inputs(self) -> int:
        """The first outputs of ``input``, which queries are or are computed from."""
        return self.input.out - self.head_dim

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        query = () if self.query is None else (self.query,)
        return (self.input, *query, self.expand, self.output)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors other than those of norms and linear layers."""
        return ()

    @property
    def norms(self) -> tuple[str, ...]:
        """The modules with norms' weights."""
        return (self.latent_norm,) if self.query is None else (self.query_norm, self.latent_norm)

    def norm_size(self, name: str) -> int:
        """Of the weight of one of ``norms``."""
        return self.query_inputs if name == self.query_norm else self.latent_dim


AnyAttention = Attention | LatentAttention
