"""The parts of a decoder-only transformer, as data.

Module names are those of transformers' models, which checkpoints and adapters use too. Names of a
layer's modules are relative to the layer (``self_attn.q_proj``); :meth:`Architecture.module` makes
them absolute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from nybble.kernels.activation import Activation


class UnsupportedModelError(ValueError):
    """The model's family, or a setting in its config.json, is not supported."""


@dataclass(frozen=True)
class Norm:
    """A normalization of hidden states.

    kind: ``rms`` is RMSNorm, ``layer`` is LayerNorm.
    offset: added to the stored weight (Gemma stores ``weight − 1``). An RMSNorm with one, 0 too,
        multiplies by the weight in float32 and rounds once; without, normed values are rounded
        before they are multiplied.
    bias: whether a bias is stored beside the weight.
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float | None = None
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer.

    rotary_dim: leading entries of a head that are rotated; the others pass through.
    parameters: transformers' ``rope_parameters`` for this layer: ``rope_type``, ``rope_theta``, and
        what the type needs.
    max_position_embeddings: the length that config.json names.
    includes_scaling: whether that length is what scaling reaches, not what it starts from. Only
        asked if ``parameters`` do not name the original length.
    query_beta: rotated queries are multiplied by
        ``1 + query_beta · ln(1 + ⌊position / original_length⌋)``.
    interleaved: whether entries ``2i`` and ``2i + 1`` form a pair, not ``i`` and
        ``i + rotary_dim / 2``.
    """

    rotary_dim: int
    parameters: Mapping[str, Any]
    max_position_embeddings: int
    interleaved: bool = False
    includes_scaling: bool = False
    query_beta: float = 0.0

    @property
    def original_length(self) -> int:
        """Tokens that the model was trained on before its frequencies were scaled."""
        original = self.parameters.get("original_max_position_embeddings")
        return int(original or self.max_position_embeddings)

    @property
    def longest_exact(self) -> int:
        """The longest sequence for which one table of frequencies is what transformers computes.

        ``dynamic`` and ``longrope`` change their frequencies once a sequence passes the original
        length. ``yarn`` and ``linear`` have one table, which serves up to original · factor.
        """
        kind = self.parameters["rope_type"]
        if kind in ("dynamic", "longrope"):
            return self.original_length
        if kind in ("yarn", "linear") and not self.includes_scaling:
            scaled = int(self.original_length * float(self.parameters["factor"]))
            return max(self.max_position_embeddings, scaled)
        return self.max_position_embeddings

    @property
    def longest(self) -> int:
        """The longest sequence that can be asked for.

        A ``longrope`` model serves more than its original length with its long factors, which are
        then used for every position (transformers uses them once a sequence passes that length).
        """
        if self.parameters["rope_type"] == "longrope":
            return self.max_position_embeddings
        return self.longest_exact


@dataclass(frozen=True)
class Linear:
    """A linear layer as checkpoints name it: ``out × inputs``.

    bias: whether the family has a bias here, which a checkpoint must then hold.
    """

    name: str
    out: int
    inputs: int
    bias: bool = False

    @property
    def leaf(self) -> str:
        """The last part of its name, which adapters and quantizers select it by."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Fold:
    """The operation that produces a group's inputs, of which each can be scaled there (AWQ).

    module: a norm, or a linear layer of which rows ``start`` to ``stop`` produce the inputs.
    shared: how many inputs one row produces: as many query heads read the same values.
    run: inputs ``i`` to ``i + run`` come of as many rows, and the next ``run`` of the same rows if
        they are shared: the size of a head.
    """

    module: str
    start: int = 0
    stop: int = 0
    shared: int = 1
    run: int = 1

    @property
    def is_linear(self) -> bool:
        """Whether ``module`` is a linear layer, not a norm."""
        return self.stop > 0


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that read the same input: one matmul if their weights allow it.

    name: of the weight that holds them all.
    fold: None if what produces the input is not linear in each of its outputs.
    """

    name: str
    linears: tuple[Linear, ...]
    fold: Fold | None = None

    @property
    def out(self) -> int:
        return sum(linear.out for linear in self.linears)

    @property
    def inputs(self) -> int:
        return self.linears[0].inputs

    @property
    def module(self) -> str:
        """The module that holds the group: attention or MLP."""
        return self.name.rpartition(".")[0]


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


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a layer keeps of each sequence, of one size however long the sequence is.

    wide: whether it is float32; otherwise it has the model's dtype.
    """

    shape: tuple[int, ...]
    wide: bool = False


@dataclass(frozen=True)
class ShortConvolution:
    """A causal convolution over a few tokens, each channel by itself, between two gates (LFM2).

    input: computes ``B``, ``C`` and ``x``, side by side, each ``channels`` wide.
    output: reads ``C · convolution(B · x)``.
    taps: tokens that the convolution sees, the newest included.
    conv: the module of its weight ``(channels, 1, taps)`` and, if ``bias``, bias ``(channels,)``.
    """

    channels: int
    taps: int
    input: LinearGroup
    output: LinearGroup
    conv: str
    bias: bool = False

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        return (self.input, self.output)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors other than those of norms and linear layers."""
        return (self.conv + ".weight", *([self.conv + ".bias"] if self.bias else ()))

    @property
    def norms(self) -> tuple[str, ...]:
        return ()

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """The last inputs of the convolution."""
        return (StateTensor((self.taps - 1, self.channels)),)


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention with a decaying state, corrected by the delta rule (Yang et al. 2024).

    Queries, keys and values pass a causal convolution and SiLU. Each value head keeps a matrix
    ``S (key_dim, value_dim)``, which a token changes so: ``S ← e^g · S``, then
    ``S ← S + k ⊗ β · (v − kᵀS)``. It reads ``qᵀS``.

    key_heads, value_heads: a key head serves ``value_heads / key_heads`` consecutive value heads.
    key_dim, value_dim: of one head.
    taps: tokens that the convolution sees, the newest included.
    input: computes queries, keys, values, the output gate ``z``, and for each value head ``b`` and
        ``a``, in this order: ``β = sigmoid(b)``, ``g = −e^A_log · softplus(a + dt_bias)``.
    interleaved: whether the first four are stored key head by key head, and so are the last two.
    output: reads each head's RMSNorm times ``silu(z)``.
    conv: a tensor ``(2 · key_heads · key_dim + value_heads · value_dim, 1, taps)``.
    decay, time_bias: tensors ``(value_heads,)``: ``A_log`` and ``dt_bias``.
    norm: a tensor ``(value_dim,)``, the weight of the norm of all heads; norm_eps: its epsilon.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    input: LinearGroup
    output: LinearGroup
    norm_eps: float
    interleaved: bool
    conv: str = "linear_attn.conv1d.weight"
    decay: str = "linear_attn.A_log"
    time_bias: str = "linear_attn.dt_bias"
    norm: str = "linear_attn.norm.weight"

    @property
    def keys(self) -> int:
        """Entries of all heads' keys; of queries as many."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Entries of all heads' values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return 2 * self.keys + self.values

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        return (self.input, self.output)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors other than those of norms of hidden states and linear layers."""
        return (self.conv, self.decay, self.time_bias, self.norm)

    @property
    def norms(self) -> tuple[str, ...]:
        return ()

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """The last inputs of the convolution, and the matrix of each head."""
        return (
            StateTensor((self.taps - 1, self.channels)),
            StateTensor((self.value_heads, self.key_dim, self.value_dim), wide=True),
        )


# What mixes the tokens of a sequence.
AnyAttention = Attention | LatentAttention
Recurrent = ShortConvolution | GatedDeltaNet
Mixer = AnyAttention | Recurrent


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss's gate: ``g · sigmoid(alpha · g) · (u + 1)``.

    g is gate, at most ``limit``; u is up, between ``−limit`` and ``limit``.
    """

    alpha: float
    limit: float


@dataclass(frozen=True)
class Xielu:
    """Apertus's activation, whose numbers each layer has learned.

    module: holds ``alpha_p``, ``alpha_n``, ``beta`` and ``eps``, a number each. See
        :func:`nybble.kernels.reference.xielu`, which gets the first as ``softplus(alpha_p)``, the
        second as ``beta + softplus(alpha_n)``.
    """

    module: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors, relative to the layer."""
        return tuple(f"{self.module}.{leaf}" for leaf in ("alpha_p", "alpha_n", "beta", "eps"))


@dataclass(frozen=True)
class Mlp:
    """A feed-forward block: ``down(activation(gate) · up)``, or ``down(activation(up))``.

    up: gate and up in one group, gate first, if ``gated``.
    clamp, xielu: instead of ``activation``, if it is not None.
    """

    up: LinearGroup
    down: LinearGroup
    activation: Activation = "silu"
    gated: bool = True
    clamp: ClampedSwiglu | None = None
    xielu: Xielu | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        return (self.up, self.down)


Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen", "sparsemixer"]


@dataclass(frozen=True)
class Router:
    """How a mixture chooses a token's experts, and what it multiplies their outputs by.

    module: holds the weight ``(experts, hidden)``. Logits and scores are float32.
    scoring: what the logits become. ``softmax`` over all experts; ``sigmoid`` of each;
        ``softmax_of_chosen`` over those with the highest logits; ``sparsemixer`` is Phi-3.5-MoE's.
    bias: whether the logits have a bias, which ``module`` then holds.
    correction_bias: a tensor ``(experts,)`` added to the scores for the choice alone; None for
        none.
    renormalize: whether the scores of the chosen experts are divided by their sum.
    least_sum: the least that they are divided by.
    scaling_factor: of all scores.
    groups: the experts are in as many groups of equal size, and only the experts of ``topk_groups``
        groups can be chosen: those with the highest ``group_score``, which is the highest score of
        a group, or the sum of the two highest.
    jitter: sparsemixer leaves out logits that are further below the highest than twice this, as a
        share of the larger of the two.
    aliases: other names that checkpoints have for its tensors, each with the name here.
    """

    module: str
    scoring: Scoring = "softmax"
    bias: bool = False
    correction_bias: str | None = None
    renormalize: bool = False
    least_sum: float = 1e-20
    scaling_factor: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    jitter: float = 0.0
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors, relative to the layer."""
        names = (self.module + ".weight", self.module + ".bias" if self.bias else None)
        return tuple(name for name in (*names, self.correction_bias) if name is not None)


@dataclass(frozen=True)
class Stacked:
    """One tensor ``(experts, rows, …)`` in which some checkpoints hold tensors of all experts.

    name: of the tensor, relative to the layer.
    holds: the names of an expert's tensors in it, relative to the layer; ``{}`` is the number of
        the expert. Each has an equal part of the rows, in this order.
    interleaved: whether their rows take turns instead.
    transposed: whether an expert's matrix is stored as ``(inputs, rows)``.
    """

    name: str
    holds: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: MLPs of which a router chooses ``top_k`` for every token.

    experts: of one shape, under the names which checkpoints with separate experts have.
    stacked: the tensors that other checkpoints have instead.
    shared: an MLP whose output is added for every token; None for none.
    shared_gate: the module of a weight ``(1, hidden)``; the shared output is multiplied by the
        sigmoid of its product with the input. None for none.
    """

    experts: tuple[Mlp, ...]
    top_k: int
    router: Router
    stacked: tuple[Stacked, ...] = ()
    shared: Mlp | None = None
    shared_gate: str | None = None

    @property
    def activation(self) -> Activation:
        return self.experts[0].activation

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers that every token passes: those of the shared expert."""
        return () if self.shared is None else self.shared.groups

    @cached_property
    def expert_groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers of the experts, expert by expert."""
        return tuple(group for expert in self.experts for group in expert.groups)


@dataclass(frozen=True)
class Layer:
    """A decoder layer: a mixer, then an MLP or a mixture, each added to the residual stream.

    mixer: attention, or what the layer has instead.
    pre_attention, pre_mlp: norms of what each reads; None if it reads the residual as it is.
    post_attention, post_mlp: norms of what each adds to the residual; None for none.
    parallel: whether attention and MLP both read ``pre_attention``'s output.
    """

    mixer: Mixer
    mlp: Mlp | Mixture
    pre_attention: str | None = "input_layernorm"
    post_attention: str | None = None
    pre_mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    parallel: bool = False

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers that every token passes, in the order in which they are computed."""
        return (*self.mixer.groups, *self.mlp.groups)

    @property
    def expert_groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers of experts, which only some tokens pass."""
        return self.mlp.expert_groups if isinstance(self.mlp, Mixture) else ()

    @property
    def linears(self) -> Iterator[Linear]:
        """All linear layers, those of experts too. A router is none: it stays in 16 bits."""
        for group in (*self.groups, *self.expert_groups):
            yield from group.linears

    @property
    def tensors(self) -> Iterator[str]:
        """Tensors other than those of norms and linear layers, which are kept in float32."""
        yield from self.mixer.tensors
        if isinstance(self.mlp, Mixture):
            yield from self.mlp.router.tensors
            if self.mlp.shared_gate is not None:
                yield self.mlp.shared_gate + ".weight"
        elif self.mlp.xielu is not None:
            yield from self.mlp.xielu.tensors


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model.

    family: transformers' ``model_type``.
    norm: what all norms of hidden states are; query and key norms too.
    embedding_multiplier: of the embeddings.
    residual_multiplier: of what attention and MLP add to the residual stream.
    logits_multiplier: of the logits.
    logits_softcap: logits become ``softcap · tanh(logits / softcap)``.
    tied: whether the output layer is the embedding matrix.
    head_bias: whether the output layer has a bias.
    unused: what the names of tensors begin with which checkpoints hold and generating does not
        read, such as those of layers that predict several tokens at once.
    """

    family: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    norm: Norm
    max_position_embeddings: int
    tied: bool
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    head_bias: bool = False
    unused: tuple[str, ...] = ()

    @staticmethod
    def module(layer: int, name: str) -> str:
        """The absolute name of a layer's module."""
        return f"model.layers.{layer}.{name}"

    @cached_property
    def attentions(self) -> tuple[AnyAttention, ...]:
        """The attention of the layers that have it, in their order."""
        return tuple(each.mixer for each in self.layers if isinstance(each.mixer, AnyAttention))

    @cached_property
    def recurrents(self) -> tuple[Recurrent, ...]:
        """What the other layers have instead, in their order."""
        return tuple(each.mixer for each in self.layers if not isinstance(each.mixer, AnyAttention))

    @cached_property
    def plain_attentions(self) -> tuple[Attention, ...]:
        """Those of ``attentions`` that cache keys and values."""
        return tuple(each for each in self.attentions if isinstance(each, Attention))

    @cached_property
    def latents(self) -> tuple[LatentAttention, ...]:
        """Those of ``attentions`` that cache latents."""
        return tuple(each for each in self.attentions if isinstance(each, LatentAttention))

    @cached_property
    def computed_in_16_bits(self) -> Mapping[str, Linear]:
        """Linear layers whose weights are dequantized when they are loaded, by absolute names."""
        return {
            self.module(index, linear.name): linear
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mixer, LatentAttention)
            for linear in layer.mixer.expand.linears
        }

    @cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of the model's layers."""
        found: list[Rope] = []
        for attention in self.attentions:
            if attention.rope is not None and attention.rope not in found:
                found.append(attention.rope)
        return tuple(found)

    @cached_property
    def default_max_model_len(self) -> int:
        """The longest sequence that is exactly what transformers computes."""
        return min((r.longest_exact for r in self.ropes), default=self.max_position_embeddings)

    @cached_property
    def max_model_len(self) -> int:
        """The longest sequence that can be asked for; see :attr:`Rope.longest`."""
        return min((rope.longest for rope in self.ropes), default=self.max_position_embeddings)

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """For each layer with attention, how many tokens one sees, itself included; 0 for all."""
        return tuple(attention.window for attention in self.attentions)

    @property
    def window(self) -> int:
        """Tokens that one sees in any layer, itself included; 0 if a layer sees all."""
        return max(self.windows) if all(self.windows) else 0

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """The modules with norms' weights, by their absolute names."""
        found = []
        for index, layer in enumerate(self.layers):
            names = [layer.pre_attention, layer.post_attention, layer.pre_mlp, layer.post_mlp]
            names += layer.mixer.norms
            found += [self.module(index, name) for name in names if name is not None]
        return (*found, self.final_norm)

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """The linear layers of all decoder layers, by their absolute names."""
        return {
            self.module(index, linear.name): linear
            for index, layer in enumerate(self.layers)
            for linear in layer.linears
        }

    @cached_property
    def dense_linears(self) -> Mapping[str, Linear]:
        """The linear layers that every token passes, all but experts', by their absolute names."""
        return {
            self.module(index, linear.name): linear
            for index, layer in enumerate(self.layers)
            for group in layer.groups
            for linear in group.linears
        }

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The absolute names of layers' tensors other than those of norms and linear layers."""
        return frozenset(
            self.module(index, name)
            for index, layer in enumerate(self.layers)
            for name in layer.tensors
        )

    @cached_property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(isinstance(layer.mlp, Mixture) for layer in self.layers)

    @cached_property
    def linear_leaves(self) -> tuple[str, ...]:
        """The last parts of the names of the linear layers that every token passes, in order."""
        return tuple(dict.fromkeys(linear.leaf for linear in self.dense_linears.values()))

    @cached_property
    def fused(self) -> Mapping[str, tuple[str, tuple[str, ...]]]:
        """For a linear layer of a group of several: the group's name, and its members' names."""
        found = {}
        for index, layer in enumerate(self.layers):
            for group in (*layer.groups, *layer.expert_groups):
                members = tuple(self.module(index, linear.name) for linear in group.linears)
                if len(members) > 1:
                    name = self.module(index, group.name)
                    found.update(dict.fromkeys(members, (name, members)))
        return found
