"""Tensor parallelism: which outputs of every weight one of several ranks computes.

Every weight is cut along its outputs: query, key and value heads, the intermediate size of gate and
up, the hidden size of what attention and MLP return, and the vocabulary. Each rank computes its own
outputs from whole inputs, and an all-gather puts the ranks' outputs together. No sum is cut, so the
result has the bits of one rank's, and nothing need be known of how a weight is quantized: groups,
act-order and codebooks are along the inputs. (Megatron-LM, Shoeybi et al. 2019, cuts every other
weight along its inputs, and adds: half the gathers, other bits.)

:class:`TensorParallel` says it once: for weights, adapters, the KV cache and the decoder's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec

import torch
import torch.distributed
from torch import Tensor

from nybble.kernels import DenseWeight, PackedWeight
from nybble.models import (
    Architecture,
    Attention,
    Layer,
    Linear,
    LinearGroup,
    Mixture,
    Mlp,
    UnsupportedModelError,
)

P = ParamSpec("P")
AnyWeight = PackedWeight | DenseWeight | Tensor
Named = tuple[str, AnyWeight]
# The first output of a range, and the one after its last.
Range = tuple[int, int]

# PyTorch 2.13 has given it another name and warns of the one before.
_all_gather: Callable[[Tensor, Tensor], object] = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)


class PeerLostError(RuntimeError):
    """Ranks could not exchange what they have computed: one of them is gone."""


@dataclass(frozen=True)
class TensorParallel:
    """One of ``size`` ranks that compute a model together. One alone has everything.

    through_host: whether what is on a GPU is exchanged in the host's memory: ranks that share a GPU
        cannot do it otherwise, and no graph can be captured.
    """

    rank: int = 0
    size: int = 1
    through_host: bool = False

    def check(self, architecture: Architecture) -> None:
        """Raises ValueError, which names the size, for a model that cannot be cut like this, and
        UnsupportedModelError for one that cannot be cut at all."""
        if architecture.recurrents:
            raise UnsupportedModelError(
                f"tensor_parallel_size is {self.size}, expected 1: {architecture.family} models "
                "have layers that keep states, which are not cut"
            )
        if architecture.latents:
            raise UnsupportedModelError(
                f"tensor_parallel_size is {self.size}, expected 1: {architecture.family} models "
                "have latent attention, whose cache is not cut"
            )
        for index, layer in enumerate(architecture.layers):
            attention = _attention(layer)
            self._divide(attention.heads, f"attention heads (layer {index})")
            kv_heads = attention.kv_heads
            if kv_heads % self.size and self.size % kv_heads:
                raise ValueError(
                    f"tensor_parallel_size is {self.size}, but layer {index} has {kv_heads} KV "
                    "heads: one must divide the other"
                )
            for mlp in mlps(layer.mlp):
                self._divide(mlp.down.inputs, f"intermediate features (layer {index})")
        self._divide(architecture.hidden, "hidden features")
        if -(-architecture.vocab // self.size) * (self.size - 1) >= architecture.vocab:
            raise ValueError(
                f"tensor_parallel_size is {self.size}, too many for a vocabulary of "
                f"{architecture.vocab} tokens"
            )

    def _divide(self, number: int, what: str) -> None:
        if number % self.size:
            fitting = [size for size in range(2, 17) if not number % size]
            raise ValueError(
                f"tensor_parallel_size is {self.size}, which does not divide the model's {number} "
                f"{what}; these do: {', '.join(map(str, fitting)) or 'none'}"
            )

    def part_of(self, architecture: Architecture) -> Architecture:
        """The architecture with the outputs of this rank alone.

        Inputs, the hidden size and the vocabulary are the model's.
        """
        if self.size == 1:
            return architecture
        return replace(architecture, layers=tuple(map(self._layer, architecture.layers)))

    def _layer(self, layer: Layer) -> Layer:
        ranges = {id(group): found for group, found in self._groups(layer)}

        def cut(group: LinearGroup) -> LinearGroup:
            own = tuple(
                replace(linear, out=length(_within(ranges[id(group)], start, stop)))
                for linear, start, stop in _places(group)
            )
            return replace(group, linears=own, fold=None)

        def cut_mlp(mlp: Mlp) -> Mlp:
            return replace(mlp, up=cut(mlp.up), down=cut(mlp.down))

        about, mlp = _attention(layer), layer.mlp
        assert mlp is not None  # check() refuses models with such layers
        attention = replace(
            about,
            heads=about.heads // self.size,
            kv_heads=length([self.kv_heads(about)]),
            qkv=cut(about.qkv),
            output=cut(about.output),
        )
        if isinstance(mlp, Mlp):
            return replace(layer, mixers=(attention,), mlp=cut_mlp(mlp))
        shared = None if mlp.shared is None else cut_mlp(mlp.shared)
        experts = tuple(map(cut_mlp, mlp.experts))
        mlp = replace(mlp, experts=experts, shared=shared)
        return replace(layer, mixers=(attention,), mlp=mlp)

    def share(self, number: int) -> Range:
        """This rank's part of so many outputs; the last one's is smaller if it does not divide."""
        each = -(-number // self.size)
        return min(self.rank * each, number), min((self.rank + 1) * each, number)

    def kv_heads(self, attention: Attention) -> Range:
        """This rank's KV heads. If there are fewer heads than ranks, several ranks have the same
        one."""
        if attention.kv_heads >= self.size:
            return self.share(attention.kv_heads)
        first = self.rank * attention.kv_heads // self.size
        return first, first + 1

    def copies(self, attention: Attention) -> int:
        """How many ranks have the same KV heads."""
        return max(1, self.size // attention.kv_heads)

    def _groups(self, layer: Layer) -> Iterator[tuple[LinearGroup, list[Range]]]:
        """The layer's groups of linear layers, each with the outputs that are this rank's."""
        about = _attention(layer)
        heads, kv_heads = self.share(about.heads), self.kv_heads(about)
        keys, values = about.heads, about.heads + about.kv_heads
        yield (
            about.qkv,
            _merged(
                ((first + start) * about.head_dim, (first + stop) * about.head_dim)
                for first, (start, stop) in ((0, heads), (keys, kv_heads), (values, kv_heads))
            ),
        )
        yield about.output, [self.share(about.output.out)]
        for mlp in mlps(layer.mlp):
            inner = mlp.down.inputs
            start, stop = self.share(inner)
            firsts = (0, inner) if mlp.gated else (0,)
            yield mlp.up, _merged((first + start, first + stop) for first in firsts)
            yield mlp.down, [self.share(mlp.down.out)]

    def outputs(self, architecture: Architecture) -> Mapping[str, list[Range]]:
        """Of every weight that is cut, by its name, the outputs that are this rank's."""
        if self.size == 1:
            return {}
        found = {architecture.head: [self.share(architecture.vocab)]}
        for index, layer in enumerate(architecture.layers):
            for group, ranges in self._groups(layer):
                found[architecture.module(index, group.name)] = ranges
                for linear, start, stop in _places(group):
                    name = architecture.module(index, linear.name)
                    found[name] = _within(ranges, start, stop)
            about = _attention(layer)
            if about.sinks is not None:
                found[architecture.module(index, about.sinks)] = [self.share(about.heads)]
            if about.qk_norm == "each":
                heads = (
                    (about.q_norm, self.share(about.heads)),
                    (about.k_norm, self.kv_heads(about)),
                )
                for name, own in heads:
                    module = architecture.module(index, name)
                    found[module + ".weight"] = found[module + ".bias"] = [own]
        return found

    def own_weights(self, architecture: Architecture, weights: Iterable[Named]) -> Iterator[Named]:
        """A checkpoint's weights with the outputs of this rank alone.

        What is one range of outputs stays a view of its file.
        """
        if self.size == 1:
            yield from weights
            return
        outputs = self.outputs(architecture)
        for name, weight in weights:
            yield name, weight if name not in outputs else cut_outputs(weight, outputs[name])

    def gather(self, own: Tensor) -> Tensor:
        """Every rank's ``(…, outputs)`` side by side, in the order of the ranks."""
        width = own.shape[-1]
        flat = own.reshape(-1, width).contiguous()
        rows = len(flat)
        if self.through_host:
            flat = flat.cpu()
        out = torch.empty(self.size * rows, width, dtype=own.dtype, device=flat.device)
        # As bytes: not every transport knows every dtype.
        try:
            _all_gather(out.view(torch.uint8), flat.view(torch.uint8))
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error
        by_row = out.to(own.device).view(self.size, rows, width).transpose(0, 1)
        return by_row.reshape(*own.shape[:-1], self.size * width)

    def gathered(self, function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        """``function``, which computes this rank's outputs, with the others' gathered."""
        if self.size == 1:
            return function

        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            return self.gather(function(*args, **kwargs))

        return call

    def gathering(
        self, function: Callable[Concatenate[Tensor, P], Tensor]
    ) -> Callable[Concatenate[Tensor, P], Tensor]:
        """``function``, which takes all ranks' outputs first, given this rank's."""
        if self.size == 1:
            return function

        def call(own: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
            return function(self.gather(own), *args, **kwargs)

        return call

    def gathered_head(self, function: Callable[P, Tensor], vocab: int) -> Callable[P, Tensor]:
        """:meth:`gathered` for outputs of which the last ranks may have fewer."""
        if self.size == 1:
            return function
        start, stop = self.share(vocab)
        missing = -(-vocab // self.size) - (stop - start)

        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            own = function(*args, **kwargs)
            return self.gather(torch.nn.functional.pad(own, (0, missing)))[..., :vocab]

        return call

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor by rank 0's; the tensor."""
        here = tensor.cpu() if self.through_host else tensor
        try:
            torch.distributed.broadcast(here.view(torch.uint8), src=0)
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error
        if self.through_host:
            tensor.copy_(here)
        return tensor


ALONE = TensorParallel()


def _attention(layer: Layer) -> Attention:
    (mixer,) = layer.mixers
    assert isinstance(mixer, Attention)  # check() refuses the others
    return mixer


def mlps(mlp: Mlp | Mixture | None) -> Iterable[Mlp]:
    """The MLPs of a layer: its only one, or a mixture's experts and the shared one."""
    if mlp is None:
        return ()
    if isinstance(mlp, Mlp):
        return (mlp,)
    return mlp.experts if mlp.shared is None else (*mlp.experts, mlp.shared)


def joined(tensor: Tensor, ranges: Sequence[Range]) -> Tensor:
    """These ranges of a tensor's first dimension; one alone is not copied."""
    parts = [tensor[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def cut_outputs(weight: AnyWeight, ranges: Sequence[Range]) -> AnyWeight:
    """These outputs of a weight, which says of how many they are a part."""
    if isinstance(weight, PackedWeight):
        return replace(weight.outputs(ranges), part_of=weight.out_features)
    if isinstance(weight, DenseWeight):
        bias = None if weight.bias is None else joined(weight.bias, ranges)
        return DenseWeight(joined(weight.weight, ranges), bias, weight.out_features)
    return joined(weight, ranges)


def _places(group: LinearGroup) -> Iterator[tuple[Linear, int, int]]:
    """The group's linear layers with the range of the group's outputs that each computes."""
    start = 0
    for linear in group.linears:
        yield linear, start, start + linear.out
        start += linear.out


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """The same outputs in as few ranges as there can be."""
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return found


def _within(ranges: Sequence[Range], first: int, last: int) -> list[Range]:
    """The parts of ``ranges`` between ``first`` and ``last``, counted from ``first``."""
    cut = ((max(start, first) - first, min(stop, last) - first) for start, stop in ranges)
    return [(start, stop) for start, stop in cut if start < stop]


def length(ranges: Sequence[Range]) -> int:
    """How many outputs these ranges have together."""
    return sum(stop - start for start, stop in ranges)
