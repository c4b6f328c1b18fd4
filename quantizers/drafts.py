"""What drafts for a model: a draft model, an EAGLE-3 head, or its own checkpoint's MTP head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nybble.engine import EngineConfig
from nybble.engine.draft_model import check_rounding, check_speculation
from nybble.kernels.progress import Progress
from nybble.loaders import Checkpoint
from nybble.loaders.checkpoint import can_be_rounded
from nybble.loaders.footprint import RoundedParts
from nybble.loaders.mtp import MtpCheckpoint, has_mtp, open_mtp
from nybble.quantizers.in_flight import InFlight, InFlightFormat
from nybble.quantizers.prepare import opened, prepare_checkpoint, rounded_parts


def stored_draft(
    model: Checkpoint,
    config: EngineConfig,
    name: str | None = None,
    *,
    aliases: Path | None = None,
    quantize: InFlightFormat | None = None,
) -> Checkpoint | None:
    """What drafts for ``model``, both as they are stored; None if nothing does but prompt lookup.

    ``mtp`` asks for the model's own head, and ``auto`` takes it if there is one.

    name: of a draft model or an EAGLE-3 head. quantize: how a draft model or an MTP head is to be
        rounded.

    Raises what opening it does, and ValueError if it cannot draft for the model as the config asks.
    """
    draft: Checkpoint | None = None
    if name is not None:
        draft = opened(name, aliases=aliases)
        check_rounding(draft, quantize)
    elif config.speculate == "mtp" or (config.speculate == "auto" and has_mtp(model)):
        draft = open_mtp(model)
    elif quantize is not None:
        raise ValueError(
            f"draft_quantize is {quantize!r}, but neither a draft model nor "
            "an MTP head is to draft: leave it out, or give a draft_model"
        )
    check_speculation(model, draft, config)
    return draft


def rounded_draft_parts(
    draft: Checkpoint | None,
    model: str,
    name: str | None,
    quantize: InFlightFormat | None,
    model_quantize: InFlightFormat | None,
) -> RoundedParts:
    """What of ``draft`` is rounded on the way; the others are :func:`prepared_draft`'s."""
    if draft is None:
        return None, None
    if isinstance(draft, MtpCheckpoint):  # rounded like the model
        return rounded_parts(model, draft, quantize or model_quantize)
    return rounded_parts(name or "", draft, quantize)


def prepared_draft(
    model: str,
    config: EngineConfig,
    name: str | None = None,
    *,
    device: torch.device,
    aliases: Path | None = None,
    quantize: InFlightFormat | None = None,
    model_quantize: InFlightFormat | None = None,
    progress: Progress = True,
) -> Checkpoint | None:
    """What drafts for the model called ``model``, to be loaded; see :func:`stored_draft`.

    model_quantize: how the model is rounded, which its own head is too if it has 16 bits. That is
        done at each start: a head is not in the cache of packed models.
    """
    if name is not None:
        return prepare_checkpoint(
            name, device=device, aliases=aliases, quantize=quantize, progress=progress
        )
    head = stored_draft(opened(model, aliases=aliases), config)
    if not isinstance(head, MtpCheckpoint):
        return head
    rounding = quantize or model_quantize
    if rounding is None or not can_be_rounded(head.source):
        return head
    return replace(head, source=InFlight(head.source, layers=rounding))
