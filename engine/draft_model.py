"""What drafts for a model, before it does: whether it fits, its memory, its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nybble.engine.config import EngineConfig, resolve_device
from nybble.engine.decoder import Decoder
from nybble.engine.eagle3_head import Eagle3Module
from nybble.engine.head_drafter import Head
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.mtp_head import MtpModule
from nybble.kernels.backend import backend_for
from nybble.kernels.progress import Progress, track
from nybble.loaders.eagle3 import read_eagle3
from nybble.loaders.mtp import MtpCheckpoint
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import AnyAttention, Architecture, UnsupportedModelError, architecture_of
from nybble.models.eagle3 import eagle3_head, is_eagle3

if TYPE_CHECKING:
    from nybble.loaders import Checkpoint

# Wider heads spill in the prefill kernel, and do not compile for Blackwell.
MAX_GPU_HEAD_DIM = 256


def check_speculation(target: Checkpoint, draft: Checkpoint | None, config: EngineConfig) -> None:
    """Raises ValueError, which says why, if a model cannot be drafted for as the config asks.

    draft: a draft model, a head, or None for neither.
    """
    if is_eagle3(target.config):
        raise UnsupportedModelError(
            f"{target.folder.name} is an EAGLE-3 head, which drafts for a model and is none: "
            "give it as draft_model"
        )
    served = architecture_of(target.config)
    if draft is None:
        if config.speculate == "draft":
            raise ValueError("speculate is 'draft', which needs a draft_model; 'ngram' needs none")
        if config.speculate == "mtp":
            raise ValueError("speculate is 'mtp', which needs the MTP head (open_mtp) as the draft")
        return
    name = draft.folder.name
    own = isinstance(draft, MtpCheckpoint)
    kind, way = ("an MTP head", "mtp") if own else ("a draft model", "draft")
    if config.speculate not in (way, "auto"):
        raise ValueError(
            f"speculate is {config.speculate!r}, expected {way!r} or 'auto' with {kind}"
        )
    if own:
        return
    device = resolve_device(config.device)
    if is_eagle3(draft.config):
        head = eagle3_head(draft.config)
        head.captured_of(served)
        _require_narrow_heads([head.attention], device)
        return
    architecture = architecture_of(draft.config)
    if architecture.recurrents:
        raise ValueError(
            f"the draft model {name} is a {architecture.family} model, which has layers whose "
            "states cannot be taken back to before a draft; expected one with attention alone"
        )
    known, drafted = (
        {id: token for token, id in load_tokenizer(folder).get_vocab().items()}
        for folder in (target.folder, draft.folder)
    )
    for id, token in sorted(known.items()):
        other = drafted.get(id)
        if other is not None and other != token:
            raise ValueError(
                f"the draft model {name} has another vocabulary: token {id} is {other!r} there and "
                f"{token!r} in {target.folder.name}; expected a model with the same tokenizer"
            )
    most = max(id for id in known if id < served.vocab)
    if most >= architecture.vocab:
        raise ValueError(
            f"the draft model {name} has {architecture.vocab} tokens and {target.folder.name} "
            f"{most + 1}; expected a model with the same tokenizer"
        )
    _require_narrow_heads(architecture.attentions, device)


def _require_narrow_heads(attentions: Sequence[AnyAttention], device: torch.device) -> None:
    widest = max(attention.head_dim for attention in attentions)
    if device.type == "cuda" and widest > MAX_GPU_HEAD_DIM:
        raise ValueError(
            f"the draft model's heads have {widest} entries; on a GPU {MAX_GPU_HEAD_DIM} is the "
            "most"
        )


def check_rounding(draft: Checkpoint, quantize: str | None) -> None:
    """Raises ValueError for a draft model that cannot be rounded while it is loaded."""
    if quantize is not None and is_eagle3(draft.config):
        raise ValueError(
            f"draft_quantize is {quantize!r}, but the draft model "
            f"{draft.folder.name} is an EAGLE-3 head, which is computed in 16 bits: leave it out"
        )


def cached_architecture(architecture: Architecture, draft: Checkpoint | None) -> Architecture:
    """A model with what its KV cache holds beside it: the layer of a head."""
    if isinstance(draft, MtpCheckpoint):
        return replace(architecture, layers=architecture.layers + draft.architecture.layers)
    if draft is None or not is_eagle3(draft.config):
        return architecture
    return eagle3_head(draft.config).beside(architecture)


def captured_layers(architecture: Architecture, draft: Checkpoint | None) -> tuple[int, ...]:
    """The layers of a model whose inputs a head reads; none if it is drafted for by no head."""
    if isinstance(draft, MtpCheckpoint):
        return (len(architecture.layers),)
    if draft is None or not is_eagle3(draft.config):
        return ()
    return eagle3_head(draft.config).captured_of(architecture)


def load_head(
    draft: Checkpoint | None, target: Decoder, device: torch.device, dtype: torch.dtype
) -> Head | None:
    """The head that drafts for a model; None if none does.

    Raises CheckpointError and ValueError for weights that are missing or of another shape.
    """
    if isinstance(draft, MtpCheckpoint):
        return MtpModule(draft, target, device, dtype)
    if draft is None or not is_eagle3(draft.config):
        return None
    about = eagle3_head(draft.config)
    tensors = read_eagle3(draft.folder, about, len(target.captures))
    return Eagle3Module(about, tensors, target, device, dtype)


def draft_cache(
    draft: Checkpoint | None, config: EngineConfig, max_model_len: int
) -> DraftCache | None:
    """The KV cache of a draft model; None if it needs none."""
    if draft is None or isinstance(draft, MtpCheckpoint) or is_eagle3(draft.config):
        return None
    return DraftCache(draft, config, max_model_len)


class DraftCache:
    """The KV cache of a draft model beside that of the model it drafts for.

    max_model_len: the most tokens of a sequence that is drafted.
    """

    def __init__(self, draft: Checkpoint, config: EngineConfig, max_model_len: int) -> None:
        self.architecture = architecture_of(draft.config)
        self.max_model_len = min(max_model_len, self.architecture.max_model_len)
        self.layout = KVCacheLayout.of(self.architecture, config, self.max_model_len)
        self._max_num_seqs = config.max_num_seqs

    def bytes_of(self, nbytes: int, others: int) -> int:
        """Its part of ``nbytes`` for both caches, in which both hold as many tokens.

        others: bytes that a sequence of ``max_model_len`` tokens takes in the other cache.
        """
        own = self.layout.sequence_bytes(self.max_model_len)
        return nbytes * own // (own + others)

    def blocks_in(self, nbytes: int) -> int:
        """Blocks of ``nbytes``. Raises ValueError if there is none."""
        return self.layout.blocks_for(nbytes, self._max_num_seqs, self.max_model_len)


def load_draft_decoder(
    draft: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    num_tokens: int,
    progress: Progress,
) -> Decoder:
    """The decoder of a draft model.

    num_tokens: one more than the highest token id that it may draft.
    """
    architecture = architecture_of(draft.config)
    device = resolve_device(config.device)
    return Decoder(
        architecture,
        track(draft.weights(), "Loading the draft model", progress, unit="tensors"),
        device=device,
        dtype=config.dtype,
        max_model_len=max_model_len,
        num_tokens=min(num_tokens, architecture.vocab),
        backend=backend_for(device, config.dtype),
        folder=draft.folder,
    )
