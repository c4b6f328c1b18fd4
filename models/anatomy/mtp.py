"""MTP heads as data: a layer of a checkpoint that predicts one token more than the model does."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.models.anatomy.feed_forward import Mlp


@dataclass(frozen=True)
class Mtp:
    """A layer that drafts the token after the next (DeepSeek-AI 2024, "DeepSeek-V3", section 2.2).

    It reads the model's hidden state of a position, after the last norm, and the embedding of the
    token that follows: ``join`` computes from the normed embedding and the normed hidden state,
    side by side, what a decoder layer goes on with. That layer is as the model's last with
    attention, or has ``mlp`` in place of its experts. Embeddings and output layer are the model's
    own. To draft further it reads its own hidden state, after ``norm``, as that of the next
    position (as SGLang and vLLM do).

    All names are absolute.

    layer: what the names of the decoder layer's modules begin with, with a dot at its end.
    embedding_norm, hidden_norm: modules of the norms of what ``join`` reads.
    join: a linear layer ``(hidden, 2 · hidden)``.
    norm: the module of the norm before the output layer; of the model's own if it is that.
    prefixes: what the names of its tensors begin with.
    copies: what those of copies of the embeddings and the output layer begin with, which
        checkpoints may hold beside it, and which are not read.
    mlp: of its layer; None for what the model's last layer has.
    """

    layer: str
    embedding_norm: str
    hidden_norm: str
    join: str
    norm: str
    prefixes: tuple[str, ...]
    copies: tuple[str, ...] = ()
    mlp: Mlp | None = None
