"""The decoder layers of a checkpoint, one in memory at a time, and their layers' inputs.

Blocks are transformers' own modules; weights come straight from the safetensors files.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.loaders import CheckpointError
from nybble.loaders.experts import open_shards
from nybble.loaders.model_config import load_config
from nybble.models import LinearGroup, architecture_of
from nybble.quantizers.skeleton import model_skeleton

_TOKENS_AT_A_TIME = 2048
# Strips in which the upper half of a symmetric product is computed: 9/16 of the work.
_STRIPS = 8


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of a layer's inputs X over the calibration tokens.

    second_moment: float32 ``(in, in)``, XᵀX divided by the number of tokens.
    mean_abs: float32 ``(in,)``, the mean of |x|.
    tokens: how many tokens reached the layer. If none did, ``second_moment`` is the identity and
        ``mean_abs`` is 1, so that calibrated methods round to the nearest.
    """

    second_moment: Tensor
    mean_abs: Tensor
    tokens: int


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Mean over the calibration tokens of ‖(Ŵ − W)x‖², for ``difference`` Ŵ − W ``(out, in)``."""
    return float(((difference @ second_moment) * difference).sum())


def relative_error(difference: Tensor, weight: Tensor, second_moment: Tensor) -> float:
    """:func:`output_error` as a part of the mean of ‖Wx‖²; 0 if nothing is lost of nothing.

    A layer may be zero as a whole: in models that were made deeper, for example.
    """
    error = output_error(difference, second_moment)
    return error / output_error(weight, second_moment) if error else 0.0


def linear_layer(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer ``name`` of ``block``."""
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    return layer


def _add_second_moment(total: Tensor, x: Tensor) -> None:
    """Add XᵀX to ``total``, except for the part far below the diagonal."""
    width = -(-x.shape[1] // _STRIPS)
    for start in range(0, x.shape[1], width):
        total[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])


def _mirrored(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


class _Enough(Exception):
    """Ends a forward pass once the wanted input has been recorded."""


class DecoderLayers:
    """Embeds token ids and runs layers; activations stay on the CPU, a layer on ``device``."""

    def __init__(
        self,
        source: Path,
        device: torch.device,
        length: int,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        """read: reads the embedding's or a block's parameter by name; None reads the 16-bit tensor
        of that name.

        Raises CheckpointError if layers or sequences of ``length`` are not supported.
        """
        config = load_config(source)
        config.quantization_config = (
            None  # layers are dense here, even if the checkpoint is quantized
        )
        self.architecture = architecture_of(config)
        self._shards = open_shards(source, self.architecture)
        self._read = read or self._shards.read
        longest = self.architecture.max_model_len
        if length > longest:
            raise CheckpointError(f"calibration texts of {length} tokens: {source} takes {longest}")
        self._device = device
        self._skeleton: Any = model_skeleton(config).model
        # For each block, the arguments of transformers' model other than the hidden states.
        self._options: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._skeleton.layers)

    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        """The linear layers of block ``index`` in the order of computation, by shared input."""
        layer = self.architecture.layers[index]
        return (*layer.groups, *layer.expert_groups)

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """``(samples, length)`` to hidden states ``(samples, length, hidden)``.

        The model's own code makes masks and positions, which later calls pass to the blocks.
        """
        model, layers = self._skeleton, self._skeleton.layers
        last = self.architecture.final_norm.rpartition(".")[2]
        norm = getattr(model, last)
        weight = self._read(self.architecture.embedding + ".weight")
        model.get_input_embeddings().weight = nn.Parameter(weight, requires_grad=False)
        stand_ins = [_StandIn(layer) for layer in layers]
        model.layers = nn.ModuleList(stand_ins)
        setattr(model, last, nn.Identity())
        try:
            parts = self._parts(token_ids)
            hidden = [model(part, use_cache=False).last_hidden_state for part in parts]
        finally:
            model.layers = layers
            setattr(model, last, norm)
            model.get_input_embeddings().to("meta")
        self._options = [
            {name: _to(value, self._device) for name, value in stand_in.options.items()}
            for stand_in in stand_ins
        ]
        return torch.cat(hidden)

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its weights, in the precision of the checkpoint; see embed."""
        block: nn.Module = self._skeleton.layers[index]
        names = list(block.state_dict())
        prefix = self.architecture.module(index, "")
        state = {name: self._read(prefix + name).to(self._device) for name in names}
        block.load_state_dict(state, assign=True)
        return block.eval().requires_grad_(False)

    def unload(self, index: int) -> None:
        """Give the memory of block ``index`` back."""
        self._skeleton.layers[index].to("meta")

    def outputs(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's outputs, ``hidden (samples, length, hidden)`` to the same shape."""
        out = torch.empty_like(hidden)
        for part, result in zip(self._parts(out), self._run(block, hidden), strict=True):
            part.copy_(result)
        return out

    def statistics(
        self, block: nn.Module, hidden: Tensor, layers: Sequence[str], *, first: int = 0
    ) -> dict[str, InputStatistics]:
        """Statistics of the inputs of ``layers`` if the block's input is ``hidden``.

        first: index of the first token of a sequence that is counted. Many models use token 0 as an
            attention sink, with activations far above all others in a few layers (Sun et al. 2024,
            "Massive Activations in Large Language Models"). A method that
            moves errors to inputs with small statistics (GPTQ) has to count it, because every
            later token reads its keys and values: leaving it out of GPTQ's Hessians raised
            SmolLM2-135M's divergence by half.
        """
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        tokens = dict.fromkeys(layers, 0)
        left: set[str] = set()  # to be seen in this pass
        for name in layers:
            inputs = linear_layer(block, name).in_features
            zeros = torch.zeros(inputs, device=self._device)
            sums[name] = zeros.new_zeros(inputs, inputs), zeros

        def gather(name: str, x: Tensor) -> None:
            # Experts and mixtures are given tokens without the dimension of sequences.
            rows = getattr(block.get_submodule(name.rpartition(".")[0]), "rows", None)
            x = x.flatten(0, -2).float()
            places = (torch.arange(len(x)) if rows is None else rows.cpu()) % hidden.shape[1]
            x = x[(places >= first).to(x.device)]
            _add_second_moment(sums[name][0], x)
            sums[name][1].add_(x.abs().sum(0))
            tokens[name] += len(x)
            left.discard(name)
            if not left:
                raise _Enough

        def hook(name: str) -> torch.utils.hooks.RemovableHandle:
            return block.get_submodule(name).register_forward_pre_hook(
                lambda module, args: gather(name, args[0])
            )

        handles = [hook(name) for name in layers]
        try:
            for part in self._parts(hidden):
                # Not the last of them in their order: families run shared experts before or after.
                left = set(layers)
                try:
                    self._forward(block, part)
                except _Enough:
                    continue
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: InputStatistics(_mirrored(moment).div_(count), total.div_(count), count)
            if (count := tokens[name])
            else InputStatistics(torch.eye(len(total)).to(total), torch.ones_like(total), 0)
            for name, (moment, total) in sums.items()
        }

    def module_outputs(
        self, block: nn.Module, hidden: Tensor, names: Sequence[str]
    ) -> dict[str, Callable[[], Tensor]]:
        """Functions that compute the outputs of modules of ``block`` if its input is ``hidden``.

        Inputs are recorded now; weights are those at the time a function is called.
        """
        calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {n: [] for n in names}

        def keep(name: str) -> torch.utils.hooks.RemovableHandle:
            return block.get_submodule(name).register_forward_pre_hook(
                lambda module, args, options: calls[name].append((args, options)), with_kwargs=True
            )

        @torch.no_grad()
        def compute(name: str) -> Tensor:
            module = block.get_submodule(name)
            results = [module(*args, **options) for args, options in calls[name]]
            # Attention modules return a tuple: the output and the attention weights.
            return torch.cat([one[0] if isinstance(one, tuple) else one for one in results])

        handles = [keep(name) for name in names]
        try:
            for part in self._parts(hidden):
                self._forward(block, part)
        finally:
            for handle in handles:
                handle.remove()
        return {name: partial(compute, name) for name in names}

    def _run(self, block: nn.Module, hidden: Tensor) -> Iterator[Tensor]:
        for part in self._parts(hidden):
            yield self._forward(block, part)

    def _parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return torch.split(hidden, max(1, _TOKENS_AT_A_TIME // hidden.shape[1]))

    @torch.no_grad()
    def _forward(self, block: nn.Module, part: Tensor) -> Tensor:
        index = next(i for i, layer in enumerate(self._skeleton.layers) if layer is block)
        result = block(part.to(self._device), **self._options[index])
        hidden = result[0] if isinstance(result, tuple) else result
        assert isinstance(hidden, Tensor)
        return hidden


class _StandIn(nn.Module):
    """Replaces a block: returns its input and keeps the other arguments of the first call."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not registered as a submodule
        self._returned = _returned(block)
        self.options: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, **options: Any) -> Any:
        if not self.options:
            self.options = {name: _first_sample(value) for name, value in options.items()}
        return (hidden, *[None] * (self._returned - 1)) if self._returned else hidden


def _returned(block: nn.Module) -> int:
    """How many values a block returns in a tuple; 0 if it returns its output alone.

    Found in its code: some of transformers' blocks are annotated with a tuple and return none.
    """
    code = ast.parse(textwrap.dedent(inspect.getsource(type(block).forward)))
    values = [each.value for each in ast.walk(code) if isinstance(each, ast.Return)]
    return max((len(each.elts) for each in values if isinstance(each, ast.Tuple)), default=0)


def _first_sample(value: Any) -> Any:
    """The first sample's entry: masks and positions are equal, as all lengths are."""
    if isinstance(value, tuple):
        return tuple(map(_first_sample, value))
    return value[:1] if isinstance(value, Tensor) and value.ndim > 1 else value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value
