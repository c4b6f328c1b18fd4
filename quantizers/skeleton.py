"""A transformers model built from a config, without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from nybble.models import architecture_of
from nybble.quantizers.separate_experts import separate_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _EmptyOnMeta(TorchFunctionMode):
    """Uninitialized tensors take no memory; computed ones (rotary frequencies, scales) do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def model_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of ``config``: linear layers and embeddings on the meta device.

    Experts of a mixture are linear layers too: see :mod:`nybble.quantizers.separate_experts`.
    """
    # It takes a second to import, and a server seldom needs it.
    from transformers import AutoModelForCausalLM

    architecture = architecture_of(config)
    # transformers' fused attention ignores the soft cap of scores.
    capped = any(attention.softcap is not None for attention in architecture.plain_attentions)
    with _EmptyOnMeta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="eager" if capped else None
        )
        separate_experts(model, architecture)
    return model
