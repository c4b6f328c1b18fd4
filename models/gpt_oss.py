"""gpt-oss: attention sinks, windows in every other layer, experts with biases and a clamp."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from nybble.models import Architecture, ClampedSwiglu, Mixture, Norm, Router, Stacked
from nybble.models import config as read
from nybble.models.llama import decoder
from nybble.models.parts import gated_mlp

_UP = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
_DOWN = ("mlp.experts.{}.down_proj",)


def gpt_oss(config: PretrainedConfig) -> Architecture:
    """Checkpoints stack the experts, rows of gate and up by turns; 16-bit ones are transposed."""
    read.refuse(config, hidden_act="silu")
    hidden, layers = read.size(config, "hidden_size"), read.size(config, "num_hidden_layers")
    clamp = ClampedSwiglu(float(config.swiglu_alpha), float(config.swiglu_limit))
    experts = Mixture(
        experts=tuple(
            replace(
                gated_mlp(
                    hidden,
                    read.size(config, "intermediate_size"),
                    "silu",
                    bias=True,
                    norm=None,
                    module=f"mlp.experts.{expert}",
                    # The clamped gate is not linear in up.
                    fold=False,
                ),
                clamp=clamp,
            )
            for expert in range(read.size(config, "num_local_experts"))
        ),
        top_k=read.size(config, "num_experts_per_tok"),
        router=Router("mlp.router", scoring="softmax_of_chosen", bias=True),
        stacked=(*_stacked("gate_up_proj", _UP), *_stacked("down_proj", _DOWN)),
        always_stacked=True,
    )
    return decoder(
        config,
        windows=read.windows(config),
        mlps=(experts,) * layers,
        attention_options={
            "bias": bool(config.attention_bias),
            "sinks": "self_attn.sinks",
        },
        norm=Norm(float(config.rms_norm_eps), offset=0.0),  # rounded once
    )


def _stacked(name: str, modules: tuple[str, ...]) -> list[Stacked]:
    by_turns = len(modules) > 1

    def holds(leaf: str) -> tuple[str, ...]:
        return tuple(f"{module}.{leaf}" for module in modules)

    return [
        Stacked(f"mlp.experts.{name}", holds("weight"), by_turns, transposed=True),
        Stacked(f"mlp.experts.{name}_bias", holds("bias"), by_turns),
        Stacked(f"mlp.experts.{name}_blocks", holds("blocks"), by_turns),
        Stacked(f"mlp.experts.{name}_scales", holds("scales"), by_turns),
    ]


FAMILIES = {"gpt_oss": gpt_oss}
