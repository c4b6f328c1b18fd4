"""EAGLE-3 heads: one layer that drafts for a model from what that model's own layers computed.

A head reads hidden states of three layers of the model it drafts for, the target, and the token
that follows them. For positions that the target has not computed yet it reads its own hidden state
instead. Its vocabulary is a part of the target's.

Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test", 2025. The layout of checkpoints (``LlamaForCausalLMEagle3``) is that of the
EAGLE repository and SpecForge, which SGLang and vLLM load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from nybble.models import Architecture, Attention, Layer, Mlp, Norm
from nybble.models import config as read
from nybble.models.config import UnsupportedModelError
from nybble.models.parts import attention, gated_mlp

_NAMES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
# Other heads that draft for a model, which nothing here computes.
_OTHERS = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM", "Eagle3Speculator", "EagleSpeculator")
_LAYERS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Eagle3Head:
    """What a head is made of. Its tensors are named as in :attr:`tensors`.

    hidden: entries of its hidden states; target_hidden: of those of the target.
    vocab: tokens that it can draft; target_vocab: tokens that the target has.
    attention: reads the normed embedding of a token and the normed hidden state, side by side.
    captured: the target's layers whose inputs it reads, in ascending order; as many as the target
        has layers means the output of the last. None for the default.
    normed_residual: whether what attention adds is added to the normed hidden state.
    """

    hidden: int
    target_hidden: int
    vocab: int
    target_vocab: int
    attention: Attention
    mlp: Mlp
    norm: Norm
    captured: tuple[int, ...] | None
    normed_residual: bool

    def captured_of(self, target: Architecture) -> tuple[int, ...]:
        """The target's layers whose inputs it reads.

        Raises UnsupportedModelError if the target has other sizes than it was trained for.
        """
        layers = len(target.layers)
        if self.target_hidden != target.hidden:
            raise UnsupportedModelError(
                f"the EAGLE-3 head reads hidden states of {self.target_hidden} entries, and the "
                f"model's have {target.hidden}; expected a head that was trained for this model"
            )
        if self.target_vocab != target.vocab:
            raise UnsupportedModelError(
                f"the EAGLE-3 head drafts for a vocabulary of {self.target_vocab} tokens, and the "
                f"model has {target.vocab}; expected a head that was trained for this model"
            )
        captured = self.captured or (2, layers // 2, layers - 3)
        if (
            list(captured) != sorted(set(captured))
            or not 0 <= captured[0] <= captured[-1] <= layers
        ):
            raise UnsupportedModelError(
                f"the EAGLE-3 head reads the layers {', '.join(map(str, captured))} of a model "
                f"that has {layers}; expected a head that was trained for this model, or "
                f"{_LAYERS} in its config.json"
            )
        return captured

    def beside(self, target: Architecture) -> Architecture:
        """The target with the head's layer as its last: what the KV cache holds of both."""
        return replace(target, layers=(*target.layers, Layer((self.attention,), self.mlp)))

    def tensors(self, captured: int) -> Mapping[str, tuple[int, ...]]:
        """The tensors that a checkpoint must have, by name, for so many captured layers."""
        groups = (*self.attention.groups, *self.mlp.groups)
        return {
            "fc.weight": (self.hidden, captured * self.target_hidden),
            **{
                f"midlayer.{name}.weight": (self.hidden,)
                for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
            },
            **{
                f"midlayer.{linear.name}.weight": (linear.out, linear.inputs)
                for group in groups
                for linear in group.linears
            },
            "norm.weight": (self.hidden,),
        }

    @property
    def optional_tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Those that may be left out: the target's are used, or both vocabularies are the same.

        ``d2t`` is, for each token of the head, what is added to its id to make it the target's.
        ``t2d`` says which of the target's tokens the head has.
        """
        return {
            "embed_tokens.weight": (self.target_vocab, self.hidden),
            "lm_head.weight": (self.vocab, self.hidden),
            "d2t": (self.vocab,),
            "t2d": (self.target_vocab,),
        }


def is_eagle3(config: PretrainedConfig) -> bool:
    """Whether a config is that of an EAGLE-3 head, by its name or a vocabulary of its own.

    Raises UnsupportedModelError for heads of other kinds, which would load as models that are not.
    """
    names: Sequence[str] = config.architectures or ()
    for name in names:
        if name in _OTHERS:
            raise UnsupportedModelError(
                f"{name} heads are not supported; supported are {' and '.join(_NAMES)}"
            )
    own_vocabulary = getattr(config, "draft_vocab_size", None) is not None
    return own_vocabulary or any(name in _NAMES for name in names)


def eagle3_head(config: PretrainedConfig) -> Eagle3Head:
    """The head that a config describes. Raises UnsupportedModelError for what is not computed."""
    read.refuse(
        config,
        num_hidden_layers=1,
        attention_bias=False,
        mlp_bias=False,
        bias=False,
        use_sliding_window=False,
        logit_scale=1.0,
    )
    hidden = read.size(config, "hidden_size")
    heads = read.head_sizes(config)
    # As if it had two hidden states: its queries, keys and values read both.
    wide = attention(2 * hidden, *heads, rope=read.rope(config, heads[2]))
    (output,) = wide.output.linears
    narrow = replace(wide.output, linears=(replace(output, out=hidden),))
    eagle = getattr(config, "eagle_config", None) or {}
    if not eagle.get("use_aux_hidden_state", True):
        raise UnsupportedModelError(
            "use_aux_hidden_state is false, which is not supported for EAGLE-3 heads: expected one "
            "that reads several layers of its model"
        )
    vocab = read.size(config, "vocab_size")
    return Eagle3Head(
        hidden=hidden,
        target_hidden=int(getattr(config, "target_hidden_size", None) or hidden),
        vocab=int(getattr(config, "draft_vocab_size", None) or vocab),
        target_vocab=vocab,
        attention=replace(wide, output=narrow),
        mlp=gated_mlp(hidden, read.size(config, "intermediate_size"), read.activation(config)),
        norm=Norm(float(config.rms_norm_eps)),
        captured=_captured(config, eagle),
        normed_residual=bool(getattr(config, "norm_before_residual", False)),
    )


def _captured(config: PretrainedConfig, eagle: Mapping[str, object]) -> tuple[int, ...] | None:
    """The layers whose inputs are read; None if the config does not say.

    ``eagle_config`` names layers whose outputs are read (SpecForge, SGLang), the config itself
    those whose inputs are (vLLM).
    """
    for ids, shift in ((eagle.get(_LAYERS), 1), (getattr(config, _LAYERS, None), 0)):
        if ids is None or ids == []:
            continue
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise UnsupportedModelError(f"{_LAYERS} is {ids!r}, expected numbers of layers")
        return tuple(sorted(each + shift for each in ids))
    return None
