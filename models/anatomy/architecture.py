"""A decoder-only transformer, as data.

Module names are those of transformers' models, which checkpoints and adapters use too. Names of a
layer's modules are relative to the layer (``self_attn.q_proj``); :meth:`Architecture.module` makes
them absolute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from nybble.models.anatomy.attention import AnyAttention, Attention, LatentAttention
from nybble.models.anatomy.feed_forward import Mixture, Mlp
from nybble.models.anatomy.linears import Linear, LinearGroup, Norm, Rope
from nybble.models.anatomy.mtp import Mtp
from nybble.models.anatomy.recurrent import Recurrent

# What mixes the tokens of a sequence.
Mixer = AnyAttention | Recurrent


@dataclass(frozen=True)
class Layer:
    """A decoder layer: mixers, then an MLP or a mixture, each added to the residual stream.

    mixers: attention, or what the layer has instead. Several read the same, and are added together;
        a layer that is only an MLP has none.
    mlp: None in a layer that has only mixers.
    pre_attention, pre_mlp: norms of what each reads; None if it reads the residual as it is.
    post_attention, post_mlp: norms of what each adds to the residual; None for none.
    parallel: whether attention and MLP both read ``pre_attention``'s output.
    """

    mixers: tuple[Mixer, ...]
    mlp: Mlp | Mixture | None
    pre_attention: str | None = "input_layernorm"
    post_attention: str | None = None
    pre_mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    parallel: bool = False

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers that every token passes, in the order in which they are computed."""
        mlp = () if self.mlp is None else self.mlp.groups
        return (*(group for mixer in self.mixers for group in mixer.groups), *mlp)

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
        for mixer in self.mixers:
            yield from mixer.tensors
        if isinstance(self.mlp, Mixture):
            yield from self.mlp.router.tensors
            if self.mlp.shared_gate is not None:
                yield self.mlp.shared_gate + ".weight"
        elif self.mlp is not None and self.mlp.xielu is not None:
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
    layer_names: what the names of a layer's modules begin with; ``{}`` is its number.
    unused: what the names of tensors begin with which checkpoints hold and the model does not read,
        such as those of layers that predict several tokens at once.
    mtp: such a layer which can draft for the model; None if its checkpoints have none.
    only: if this is a part of a checkpoint, what the names of its tensors begin with; empty for
        all that are not unused.
    peft_seeks_experts: whether peft takes names of experts' linear layers among an adapter's
        ``target_modules`` for those of experts alone, even where other layers have them too.
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
    layer_names: str = "model.layers.{}."
    unused: tuple[str, ...] = ()
    mtp: Mtp | None = None
    only: tuple[str, ...] = ()
    peft_seeks_experts: bool = False

    def module(self, layer: int, name: str) -> str:
        """The absolute name of a layer's module."""
        return self.layer_names.format(layer) + name

    @cached_property
    def mtp_head(self) -> Architecture | None:
        """What ``mtp`` goes on with after ``join``, as a model of one layer; None without it.

        Its embeddings and its output layer are this model's.
        """
        if self.mtp is None:
            return None
        layer = next(
            each
            for each in reversed(self.layers)
            if any(isinstance(mixer, AnyAttention) for mixer in each.mixers)
        )
        if self.mtp.mlp is not None:
            layer = replace(layer, mlp=self.mtp.mlp)
        return replace(
            self,
            layers=(layer,),
            layer_names=self.mtp.layer,
            final_norm=self.mtp.norm,
            unused=self.mtp.copies,
            mtp=None,
            only=(*self.mtp.prefixes, self.mtp.norm + "."),
        )

    @cached_property
    def head_share(self) -> float:
        """The output layer's part of the products that a token takes whose logits are computed."""
        groups = [group for layer in self.layers for group in layer.groups]
        for layer in self.layers:
            if isinstance(layer.mlp, Mixture):
                groups += layer.mlp.experts[0].groups * layer.mlp.top_k
        head = self.vocab * self.hidden
        return head / (head + sum(group.inputs * group.out for group in groups))

    @cached_property
    def attentions(self) -> tuple[AnyAttention, ...]:
        """The attention of the layers that have it, in their order."""
        return tuple(each for each in self._mixers if isinstance(each, AnyAttention))

    @cached_property
    def recurrents(self) -> tuple[Recurrent, ...]:
        """What layers have instead of attention or beside it, in their order."""
        return tuple(each for each in self._mixers if not isinstance(each, AnyAttention))

    @property
    def _mixers(self) -> Iterator[Mixer]:
        return (mixer for layer in self.layers for mixer in layer.mixers)

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
            for mixer in layer.mixers
            if isinstance(mixer, LatentAttention)
            for linear in mixer.expand.linears
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
            names += [name for mixer in layer.mixers for name in mixer.norms]
            found += [self.module(index, name) for name in names if name is not None]
        return (*found, self.final_norm)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The modules with plain weights that every checkpoint has, by their absolute names."""
        return self.norms if self.only else (self.embedding, *self.norms)

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
    def taken_for_experts(self) -> frozenset[str]:
        """Those of ``dense_linears`` that no ``target_modules`` name to peft."""
        if not self.peft_seeks_experts:
            return frozenset()
        of_experts = {
            linear.leaf
            for layer in self.layers
            for group in layer.expert_groups
            for linear in group.linears
        }
        named = self.dense_linears.items()
        return frozenset(name for name, linear in named if linear.leaf in of_experts)

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
