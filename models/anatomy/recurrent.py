"""Mixers with a state in place of a cache, as data: convolutions, gated delta nets, Mamba-2."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.models.anatomy.linears import LinearGroup


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


@dataclass(frozen=True)
class StateSpace:
    """A state space with a scalar decay for each head, "Mamba-2" (Dao and Gu 2024).

    ``x``, ``B`` and ``C`` pass a causal convolution and SiLU. Each head keeps a matrix
    ``S (state_dim, head_dim)``, which a token changes so: ``S ← e^(Δ·A) · S + Δ · B ⊗ x``. It reads
    ``CᵀS + D · x``, with ``A = −e^A_log`` and ``Δ = softplus(dt + dt_bias)``.

    key_groups: so many ``B`` and ``C``, each of which serves consecutive heads.
    taps: tokens that the convolution sees, the newest included.
    input: computes the output gate ``z``, ``x``, ``B``, ``C``, and for each head ``dt``, side by
        side.
    output: reads what is read, times ``silu(z)``, then normed, if there is a norm: an RMSNorm of
        each key group's part.
    conv: the module of its weight ``(channels, 1, taps)`` and, if ``bias``, bias ``(channels,)``.
    decay, skip, time_bias: tensors ``(heads,)``: ``A_log``, ``D`` and ``dt_bias``.
    norm: a tensor ``(heads · head_dim,)``, the norm's weight, None for no norm; norm_eps: its
        epsilon.
    """

    heads: int
    head_dim: int
    key_groups: int
    state_dim: int
    taps: int
    input: LinearGroup
    output: LinearGroup
    norm_eps: float
    bias: bool
    conv: str = "mamba.conv1d"
    decay: str = "mamba.A_log"
    skip: str = "mamba.D"
    time_bias: str = "mamba.dt_bias"
    norm: str | None = "mamba.norm.weight"

    @property
    def values(self) -> int:
        """Entries of all heads' ``x``."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Entries of all ``B``; of ``C`` as many."""
        return self.key_groups * self.state_dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return self.values + 2 * self.keys

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear layers in the order of computation."""
        return (self.input, self.output)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors other than those of norms of hidden states and linear layers."""
        convolution = (self.conv + ".weight", *([self.conv + ".bias"] if self.bias else ()))
        norm = () if self.norm is None else (self.norm,)
        return (*convolution, self.decay, self.skip, self.time_bias, *norm)

    @property
    def norms(self) -> tuple[str, ...]:
        return ()

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """The last inputs of the convolution, and the matrix of each head."""
        return (
            StateTensor((self.taps - 1, self.channels)),
            StateTensor((self.heads, self.state_dim, self.head_dim), wide=True),
        )


Recurrent = ShortConvolution | GatedDeltaNet | StateSpace
