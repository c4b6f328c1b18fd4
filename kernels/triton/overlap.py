"""Programmatic dependent launch: kernels of a step that begin while the one before is finishing.

A launch then costs the time of its blocks alone, because they are on the device already when the
kernel before ends. From sm_90 on (Hopper); elsewhere kernels follow one another as usual. The
matmul has the same by a field of its configuration (``configs.Config.overlap``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton.device import device_traits
from nybble.kernels.triton.unpack import INTERPRETED

# Off until a GPU has measured it: ``make gpu`` decodes with and without.
OVERLAP = False


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """The first thing a kernel does: it waits for the one before, and lets the next one begin.

    Nothing that another kernel writes or reads may be touched earlier. All programs wait, so that
    a kernel ends after all those before it, and waiting for one is waiting for all.
    """
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlaps(device: torch.device) -> bool:
    """Whether a step's kernels overlap on this device."""
    return OVERLAP and device_traits(device)[2] >= 90


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that begins by :func:`follow`."""
    on = overlaps(device)
    return {"OVERLAP": on, **({"launch_pdl": True} if on else {})}
