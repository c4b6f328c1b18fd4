"""How often which size came up, in buckets that double."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeCounts:
    """``counts[i]`` sizes were at most 2**i and above 2**(i - 1); ``total`` is their sum."""

    counts: tuple[int, ...] = ()
    total: int = 0

    def plus(self, size: int) -> SizeCounts:
        """These and one more; size ≥ 1."""
        bucket = (size - 1).bit_length()
        counts = [*self.counts, *[0] * (bucket + 1 - len(self.counts))]
        counts[bucket] += 1
        return SizeCounts(tuple(counts), self.total + size)
