"""What an installed nybble consists of."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(link.name for link in (ROOT / "src" / "nybble").iterdir() if link.is_symlink())


def test_every_package_is_a_top_level_folder() -> None:
    assert {"engine", "kernels", "loaders", "models", "server"} <= set(PACKAGES)
    assert all((ROOT / name / "__init__.py").is_file() for name in PACKAGES)


def test_the_image_has_every_package() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [name for name in PACKAGES if f"COPY {name} {name}" not in lines] == []
