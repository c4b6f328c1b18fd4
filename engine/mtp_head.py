"""An MTP head as a module: hidden states and tokens in, likely next tokens out.

See :class:`nybble.models.Mtp` for what it is. Behind what joins its two inputs it is a decoder of
one layer, with the target's embeddings, output layer and kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nybble.engine.decoder import Decoder
from nybble.engine.parts import KVCache, NormPart, norm_part
from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.attention_batch import AttentionBatch
from nybble.kernels.matmul import preferred_layout
from nybble.kernels.packed import Weight
from nybble.loaders.checkpoint import Weight as Stored
from nybble.loaders.errors import CheckpointError
from nybble.loaders.mtp import MtpCheckpoint


class MtpModule:
    """Computes a head; holds weights and no per-sequence state.

    See :class:`nybble.engine.head_drafter.Head`.
    """

    method = "mtp"

    def __init__(
        self, checkpoint: MtpCheckpoint, target: Decoder, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raises CheckpointError naming a weight that is missing or of another shape."""
        about, hidden = checkpoint.about, checkpoint.architecture.hidden
        self._target = target
        inputs: dict[str, Stored] = {}
        names = (about.embedding_norm + ".weight", about.hidden_norm + ".weight")
        joins = (about.join, about.join + ".weight")

        def weights() -> Iterator[tuple[str, Stored]]:
            """Those of the layer, with the target's at its ends; others are put aside."""
            yield checkpoint.architecture.embedding + ".weight", target.embedding
            # Of several ranks each has a part of the output layer, and one drafts.
            whole = target.base.head.out_features == target.architecture.vocab
            head = target.base.head if whole else checkpoint.output_layer()
            if head is not None:
                yield checkpoint.architecture.head, head
            for name, weight in checkpoint.weights():
                if name in names or name in joins:
                    inputs[name] = weight
                else:
                    yield name, weight

        try:
            self._layer = Decoder(
                checkpoint.architecture,
                weights(),
                device=device,
                dtype=dtype,
                max_model_len=target.max_model_len,
                num_tokens=target.num_tokens,
                backend=target.backend,
            )
        except ValueError as error:
            hint = ""
            if checkpoint.architecture.has_experts and device.type == "cuda":
                hint = " (--draft-quantize nf4 rounds a head in 16 bits alone)"
            raise CheckpointError(f"the MTP head of {checkpoint.folder}: {error}{hint}") from error

        def refused(name: str, expected: str) -> CheckpointError:
            return CheckpointError(f"the MTP head of {checkpoint.folder}: {name} is not {expected}")

        def norm(name: str) -> NormPart:
            weight = inputs.get(name)
            if not isinstance(weight, Tensor) or weight.shape != (hidden,):
                raise refused(name, f"a norm's weight of {hidden} entries")
            placed = weight.to(device, dtype)
            return norm_part(checkpoint.architecture.norm, placed, None, target.backend)

        self._embedding_norm, self._hidden_norm = map(norm, names)
        (join,) = (inputs[name] for name in joins if name in inputs)
        weight: Weight
        if isinstance(join, Tensor):
            weight = DenseWeight(join.to(device, dtype))
        elif isinstance(join, PackedWeight):
            weight = join.to(device).to_layout(preferred_layout(device))
        else:
            weight = DenseWeight(join.weight.to(device, dtype))
        if (weight.out_features, weight.in_features) != (hidden, 2 * hidden):
            raise refused(about.join, f"a linear layer of {2 * hidden} inputs and {hidden} outputs")
        self._join = target.backend.linear(weight, dtype)

    def fuse(self, captured: Tensor) -> Tensor:
        """Of the target's hidden states ``(rows, hidden)``: as its output layer reads them."""
        return self._target.normed(captured)

    def forward(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
    ) -> Tensor:
        """Hidden states ``(rows, hidden)``, after the head's last norm.

        See :meth:`nybble.engine.head_drafter.Head.forward`.
        """
        embedded = self._embedding_norm(self._target.embed(token_ids))
        joined = self._join(torch.cat([embedded, self._hidden_norm(hidden)], dim=-1))
        out = self._layer.forward(token_ids, positions, [cache], [batch], embedded=joined)
        return self._layer.normed(out)

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`nybble.engine.head_drafter.Head.choose`."""
        logits = self._layer.logits_of_normed(hidden)
        largest, tokens = logits.max(dim=-1)
        return tokens, (largest - logits.logsumexp(dim=-1)).exp()
