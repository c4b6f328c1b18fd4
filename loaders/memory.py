"""Memory that loading has freed, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")
_AT_A_TIME = 16  # weights: a call takes milliseconds


def trimmed(weights: Iterable[_T]) -> Iterator[_T]:
    """``weights``, with what was freed between them given back every now and then.

    glibc keeps the freed space between allocations that live on, which after the hundreds of small
    matrices of a mixture of experts is as much as 40% of their size. With another C library this
    changes nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    count = 0
    for count, weight in enumerate(weights, start=1):
        yield weight
        if trim is not None and count % _AT_A_TIME == 0:
            trim(0)
    if trim is not None and count >= _AT_A_TIME:
        trim(0)
