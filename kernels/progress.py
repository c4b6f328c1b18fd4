"""Progress of long work: shown on stderr, or reported to a callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm.asyncio import tqdm_asyncio

T = TypeVar("T")

# Called with: what is being done, how many pieces are done, and their total (None: not known).
Report = Callable[[str, int, int | None], None]
# True for a bar on stderr, False for nothing.
Progress = bool | Report

_LINE_SECONDS = 10


if TYPE_CHECKING:
    _Tqdm = tqdm_asyncio[Any]
else:  # it is generic in its stubs only
    _Tqdm = tqdm_asyncio


class Bar(_Tqdm):
    """tqdm's bar on a terminal; elsewhere, as in a log file, a line every ten seconds at most.

    Where the total is not known, how many are done is all that it says.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._lines = not (options.get("file") or sys.stderr).isatty()
        self._shown = ""
        if self._lines:
            options |= {
                "mininterval": _LINE_SECONDS,
                "leave": False,  # close would otherwise end the last line once more
            }
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._lines:
            return super().display(msg, pos)
        done = "{n_fmt}" if self.total is None else "{n_fmt}/{total_fmt}"
        self.bar_format = f"{{desc}}: {done}{{unit}}{{postfix}} ({{elapsed}})"
        line = str(self) if msg is None else msg
        if line and line != self._shown:
            self.fp.write(f"{line}\n")
            self.fp.flush()
            self._shown = line
        return None

    def clear(self, nolock: bool = False) -> None:
        if not self._lines:
            super().clear(nolock)

    def close(self) -> None:
        if self._lines and not self.disable:
            self.display()
        super().close()


def track(
    items: Iterable[T], what: str, progress: Progress, *, unit: str = "it", total: int | None = None
) -> Iterator[T]:
    """Yield ``items``, and show or report after each how many are done."""
    if isinstance(progress, bool):
        yield from Bar(items, what, total, unit=f" {unit}", disable=not progress)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    progress(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(what, done, total)
