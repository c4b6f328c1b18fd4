"""``nybble cache``: the packed models that starts have left, and removing those of no use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.server.cli.errors import expected_errors

if TYPE_CHECKING:
    from nybble.quantizers.packed_cache import Entry

cache = typer.Typer(help="Packed models in the cache.", no_args_is_help=True)


@cache.command("list")
def list_entries() -> None:
    """List packed models: size, what each was made from, and why a start cannot use it again.

    Those which a start can use again are "kept".
    """
    with expected_errors():
        from nybble.quantizers.packed_cache import entries, packed_folder

        found = entries()
        _print(found)
        print(f"in {packed_folder()}", file=sys.stderr)


@cache.command()
def prune(
    every: Annotated[
        bool,
        typer.Option("--all", help="Also those kept for the next start, which packs them again."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be removed.")
    ] = False,
) -> None:
    """Remove packed models which no start will use again."""
    with expected_errors():
        from nybble.engine.memory import gib
        from nybble.quantizers.packed_cache import entries, remove

        found = [entry for entry in entries() if every or entry.stale]
        _print(found)
        if not dry_run:
            for entry in found:
                remove(entry)
        freed = gib(sum(entry.nbytes for entry in found))
        print(f"{'would free' if dry_run else 'freed'} {freed}", file=sys.stderr)


def _print(entries: list[Entry]) -> None:
    from nybble.engine.memory import gib

    for entry in entries:
        origin = entry.origin
        made = "?" if origin is None else f"{origin.source} ({origin.recipe}; {origin.layout})"
        print(f"{gib(entry.nbytes):>12}  {entry.stale or 'kept'}  {made}  {entry.path.name}")
