"""Progress of long work: shown as a bar on stderr, or reported to a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Called with: what is being done, how many pieces are done, and their total (None: not known).
Report = Callable[[str, int, int | None], None]
# True for a bar on stderr, False for nothing.
Progress = bool | Report


def track(
    items: Iterable[T], what: str, progress: Progress, *, unit: str = "it", total: int | None = None
) -> Iterator[T]:
    """Yield ``items``, and show or report after each how many are done."""
    if isinstance(progress, bool):
        yield from tqdm(items, what, total, unit=f" {unit}", disable=not progress)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    progress(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(what, done, total)
