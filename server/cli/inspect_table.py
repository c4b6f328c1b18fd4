"""``nybble inspect``'s table."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from nybble.engine.memory import gib
from nybble.loaders.inspect import WeightSummary

# Wide enough for every column if the output is not a terminal.
_PIPE_WIDTH = 120
_LAYER = re.compile(r"\.layers\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def print_table(weights: Iterable[WeightSummary], *, every: bool) -> None:
    """One line per weight, or per kind of weight over all layers, and the total.

    All experts of a layer are one line for each of their weights.
    """
    # (name, kind, shape, group) → how many, and their bytes; in the checkpoint's order.
    rows: dict[tuple[str, str, tuple[int, ...], int | None], list[int]] = {}
    for weight in weights:
        name = _EXPERT.sub(".experts.*.", weight.name)
        if not every:
            name = _LAYER.sub(".layers.*.", name)
        key = (name, weight.kind, weight.shape, weight.group_size)
        rows.setdefault(key, []).append(weight.nbytes)

    table = Table(show_footer=True)
    total = sum(map(sum, rows.values()))
    elements = sum(_elements(shape) * len(sizes) for (_, _, shape, _), sizes in rows.items())
    table.add_column("weight", footer="total")
    table.add_column("count", justify="right", footer=str(sum(map(len, rows.values()))))
    table.add_column("format")
    table.add_column("shape", justify="right", footer=f"{elements:,} elements")
    table.add_column("group", justify="right")
    table.add_column("bits/weight", justify="right", footer=f"{8 * total / max(elements, 1):.3f}")
    table.add_column("size", justify="right", footer=gib(total))
    for (name, kind, shape, group), sizes in rows.items():
        bits = 8 * sum(sizes) / (_elements(shape) * len(sizes))
        table.add_row(
            name,
            str(len(sizes)),
            kind,
            "×".join(map(str, shape)),
            "" if group is None else str(group),
            f"{bits:.3f}",
            gib(sum(sizes)),
        )
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(table)


def _elements(shape: tuple[int, ...]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements
