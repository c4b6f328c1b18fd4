"""An EAGLE-3 head as a module: hidden states and tokens in, likely next tokens out.

See :class:`nybble.models.eagle3.Eagle3Head` for what it is. It has the target's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from nybble.engine.decoder import Decoder
from nybble.engine.parts import (
    AttentionPart,
    KVCache,
    MlpPart,
    NormPart,
    Projection,
    Step,
    norm_part,
)
from nybble.engine.rotary import rotary_table
from nybble.kernels import DenseWeight
from nybble.kernels.attention_batch import AttentionBatch
from nybble.models import LinearGroup
from nybble.models.eagle3 import Eagle3Head

_LAYER = "midlayer."


class Eagle3Module:
    """Computes a head; holds weights and no per-sequence state.

    See :class:`nybble.engine.head_drafter.Head`. about: what it is made of.
    """

    method = "eagle3"

    def __init__(
        self,
        about: Eagle3Head,
        tensors: Mapping[str, Tensor],
        target: Decoder,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """tensors: as :func:`nybble.loaders.eagle3.read_eagle3` reads them.

        Raises ValueError if it has no embedding, and the target's has another width, if it has no
        output layer, and the target's is one of several ranks', or if it drafts tokens that the
        target does not have.
        """
        self.about, backend = about, target.backend

        def linear(group: LinearGroup, index: int) -> Projection:
            weights = [tensors[f"{_LAYER}{each.name}.weight"] for each in group.linears]
            weight = DenseWeight(torch.cat(weights).to(device, dtype))
            return Projection((backend.linear(weight, dtype),), index)

        def norm(name: str) -> NormPart:
            return norm_part(about.norm, tensors[name].to(device, dtype), None, backend)

        if "embed_tokens.weight" in tensors:
            self._embedding = tensors["embed_tokens.weight"].to(device, dtype)
        elif about.hidden == target.architecture.hidden:
            self._embedding = target.embedding
        else:
            raise ValueError(
                f"the EAGLE-3 head has no embed_tokens, and its hidden states have {about.hidden} "
                f"entries, but the model's embeddings {target.architecture.hidden}"
            )
        self._fuse = backend.linear(DenseWeight(tensors["fc.weight"].to(device, dtype)), dtype)
        layer = f"{_LAYER}{{}}.weight".format
        self._input_norm = norm(layer("input_layernorm"))
        self._hidden_norm = norm(layer("hidden_norm"))
        self._attention = AttentionPart(
            about.attention,
            sinks=None,
            layer=0,
            rope=0,
            qkv=linear(about.attention.qkv, 0),
            q_norm=None,
            k_norm=None,
            output=linear(about.attention.output, 1),
            backend=backend,
        )
        self._mlp_norm = norm(layer("post_attention_layernorm"))
        self._mlp = MlpPart(
            linear(about.mlp.up, 2),
            partial(backend.gated, activation=about.mlp.activation),
            linear(about.mlp.down, 3),
        )
        self._norm = norm("norm.weight")
        own = tensors.get("lm_head.weight")
        head = target.base.head if own is None else DenseWeight(own.to(device, dtype))
        self._head = backend.linear(head, dtype)
        self._ids = torch.arange(about.vocab)
        if (shift := tensors.get("d2t")) is not None:
            self._ids = self._ids + shift.long().cpu()
        if not 0 <= int(self._ids.min()) <= int(self._ids.max()) < about.target_vocab:
            raise ValueError(
                f"the EAGLE-3 head's d2t leads to token {int(self._ids.max())}, expected less than "
                f"{about.target_vocab}"
            )
        self._ids = self._ids.to(device)
        assert about.attention.rope is not None
        self._rotary = rotary_table(about.attention.rope, target.max_model_len, device)

    def fuse(self, captured: Tensor) -> Tensor:
        """Of the target's hidden states ``(rows, layers · target_hidden)``: ``(rows, hidden)``."""
        return self._fuse(captured)

    def forward(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
    ) -> Tensor:
        """Hidden states ``(rows, hidden)``, before the last norm.

        See :meth:`nybble.engine.head_drafter.Head.forward`.
        """
        cos, sin = self._rotary
        step = Step([(cos[positions], sin[positions])], [None], [cache], [batch], None)
        normed = self._hidden_norm(hidden)
        both = torch.cat([self._input_norm(self._embedding[token_ids]), normed], dim=-1)
        residual = normed if self.about.normed_residual else hidden
        x, residual = self._mlp_norm.add(self._attention(both, step), residual)
        return residual + self._mlp(x, step)

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`nybble.engine.head_drafter.Head.choose`."""
        logits = self._head(self._norm(hidden)).float()
        largest, tokens = logits.max(dim=-1)
        return self._ids[tokens], (largest - logits.logsumexp(dim=-1)).exp()
