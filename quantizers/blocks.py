"""The decoder blocks of a checkpoint, one in memory at a time, and what their layers read.

Blocks are transformers' own modules; weights come straight from the safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.loaders import CheckpointError
from nybble.loaders.shards import Shards

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# The linear layers of a block in the order in which they are computed, by the input they share.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
STAGES = (QKV, OUTPUT, GATE_UP, DOWN)

_TOKENS_AT_A_TIME = 2048
# In which the upper part of a symmetric product is computed: 9/16 of the whole.
_STRIPS = 8


@dataclass(frozen=True)
class InputStatistics:
    """Of a layer's inputs X over the calibration tokens.

    second_moment: float32 ``(in, in)``, XᵀX divided by the number of tokens.
    mean_abs: float32 ``(in,)``, the mean of |x|.
    """

    second_moment: Tensor
    mean_abs: Tensor


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Mean over the calibration tokens of ‖(Ŵ − W)x‖², for ``difference`` Ŵ − W ``(out, in)``."""
    return float(((difference @ second_moment) * difference).sum())


def linear_layer(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer ``name`` of ``block``."""
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    return layer


def _add_second_moment(total: Tensor, x: Tensor) -> None:
    """Add XᵀX to ``total``, of which the part far below the diagonal is left as it is."""
    width = -(-x.shape[1] // _STRIPS)
    for start in range(0, x.shape[1], width):
        total[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])


def _mirrored(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


class _Enough(Exception):
    """Ends a forward pass once the input that was wanted is there."""


class DecoderBlocks:
    """Embeds token ids and runs blocks; activations stay on the CPU, a block on ``device``."""

    def __init__(
        self,
        source: Path,
        device: torch.device,
        length: int,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        """read: a block's parameter by name, where it is not the 16-bit tensor of that name.

        Raises CheckpointError where blocks or sequences of ``length`` are not supported.
        """
        self._shards = Shards(source)
        self._read = read or self._shards.read
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        config.quantization_config = None  # the blocks are dense, whatever is read into them
        if config.model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{source}: model_type {config.model_type!r} is not supported; "
                f"supported are {', '.join(MODEL_TYPES)}"
            )
        longest = config.max_position_embeddings
        if getattr(config, "use_sliding_window", True) and config.model_type != "llama":
            longest = min(longest, getattr(config, "sliding_window", None) or longest)
        if length > longest:
            raise CheckpointError(f"calibration texts of {length} tokens: {source} takes {longest}")
        self._device = device
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(config).model  # type: ignore[no-untyped-call]
        # Built apart: its frequencies are computed, not loaded.
        rotary = type(self._skeleton.rotary_emb)(config).to(device)
        dtype = self._shards.read("model.embed_tokens.weight").dtype
        self._positions = rotary(
            torch.empty(1, device=device, dtype=dtype), torch.arange(length, device=device)[None]
        )

    def __len__(self) -> int:
        return len(self._skeleton.layers)

    def embed(self, token_ids: Tensor) -> Tensor:
        """``(samples, length)`` to hidden states ``(samples, length, hidden)``."""
        return self._shards.read("model.embed_tokens.weight")[token_ids]

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its weights, in the precision of the checkpoint."""
        block: nn.Module = self._skeleton.layers[index]
        names = [name for name, _ in block.named_parameters()]
        prefix = f"model.layers.{index}."
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
        """Of the inputs that ``layers`` read when the block reads ``hidden``.

        first: of a sequence's tokens, the first that counts. Many models use token 0 as an
            attention sink, with activations far above all others in a few layers (Sun et al. 2024,
            "Massive Activations in Large Language Models"). Whoever moves errors to where the
            statistics show no input has to count it, for every later token reads its keys and
            values: leaving it out of GPTQ's Hessians raised SmolLM2-135M's divergence by half.
        """
        sums: dict[str, tuple[Tensor, Tensor]] = {}

        def gather(name: str, x: Tensor) -> None:
            x = x[:, first:].flatten(0, -2).float()
            if name not in sums:
                sums[name] = (x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1]))
            _add_second_moment(sums[name][0], x)
            sums[name][1].add_(x.abs().sum(0))
            if name == layers[-1]:
                raise _Enough

        def hook(name: str) -> torch.utils.hooks.RemovableHandle:
            return block.get_submodule(name).register_forward_pre_hook(
                lambda module, args: gather(name, args[0])
            )

        handles = [hook(name) for name in layers]
        try:
            for part in self._parts(hidden):
                try:
                    self._forward(block, part)
                except _Enough:
                    continue
        finally:
            for handle in handles:
                handle.remove()
        tokens = hidden.shape[0] * (hidden.shape[1] - first)
        return {
            name: InputStatistics(_mirrored(moment).div_(tokens), total.div_(tokens))
            for name, (moment, total) in sums.items()
        }

    def module_outputs(
        self, block: nn.Module, hidden: Tensor, names: Sequence[str]
    ) -> dict[str, Callable[[], Tensor]]:
        """Functions that compute what modules of ``block`` give when the block reads ``hidden``.

        Inputs are those the modules have now; weights, those they have when a function is called.
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
            # Attention gives its weights too.
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
        # Without a mask attention is causal.
        result = block(part.to(self._device), position_embeddings=self._positions)
        assert isinstance(result, Tensor)
        return result
