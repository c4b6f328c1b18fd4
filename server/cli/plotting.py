"""Whether an image can be drawn, asked before the work whose results it shows."""

from __future__ import annotations

from pathlib import Path


def require_plot(path: Path | None) -> None:
    """Raises ValueError if no image can be drawn to this path later; None is no image."""
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(
            f"--plot {path}: the name has to end in .png, .svg, .pdf or another of "
            f"{', '.join(sorted(known))}"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.absolute().parent}")
