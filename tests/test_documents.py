"""The documents say what is there. Run as a script, it writes their tables anew (`make format`)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    ROOT / "kernels" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
# From above to below, with what heads their part of the table.
FOLDERS = {
    "src/nybble": "the package",
    "server": "HTTP, the API, tenants, the command line",
    "finetune": "training",
    "quantizers": "4-bit models from 16-bit ones, merging, evaluation",
    "engine": "continuous batching over one model",
    "loaders": "files to weights",
    "models": "what a model is made of",
    "kernels": "the packed weight and what computes with it",
}


def modules(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if file.name != "__init__.py" and "bench" not in inside.parts:
            yield file


def summary(file: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s", text.partition("\n\n")[0].replace("\n", " "))[0]
    sentence = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", sentence).replace("``", "`")
    return sentence.rstrip(".:").replace("|", "\\|")


def module_table() -> str:
    parts = []
    for name, heading in FOLDERS.items():
        files = modules(ROOT / name)
        if name == "src/nybble":  # the others are reached by their own names, not through the links
            files = iter(sorted(file for file in (ROOT / name).glob("*.py") if file.stem[0] != "_"))
        rows = [f"| `{file.relative_to(ROOT / name)}` | {summary(file)} |" for file in files]
        parts.append(
            "\n".join([f"### `{name}/`: {heading}\n", "| module | |", "| --- | --- |", *rows])
        )
    return "\n\n".join(parts)


def serve_options() -> dict[str, list[Any]]:
    """The options of ``serve`` by the panel that ``--help`` shows them in."""
    from nybble.server.cli.main import app

    command: Any = typer.main.get_command(app)
    panels: dict[str, list[Any]] = {}
    for option in command.commands["serve"].params:
        if "--help" not in option.opts:
            panel = getattr(option, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(option)
    return panels


def option_table() -> str:
    rows = ["| option | default | |", "| --- | --- | --- |"]
    for panel, options in serve_options().items():
        rows.append(f"| **{panel}** | | |")
        for option in options:
            given = [*option.opts, *option.secondary_opts]
            if not option.opts[0].startswith("-"):
                given = [option.metavar or "MODEL"]
            form = option.metavar if option.opts[0].startswith("-") else None
            names = ", ".join(f"`{name}{f' {form}' if form else ''}`" for name in given)
            shown = default_of(option)
            text = getattr(option, "help", None) or ""
            kind = option.type_descriptor.annotation
            if get_origin(kind) is Literal:
                text = f"{', '.join(get_args(kind))}. {text}"
            rows.append(f"| {names} | {shown} | {text.strip()} |".replace("  ", " "))
    return "\n".join(rows)


def default_of(option: Any) -> str:
    """As a user would write it. Sizes, for which it is a number of bytes, say it in their help."""
    default = option.default
    if default is None or default == "" or callable(default) or option.metavar == "SIZE":
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default}`"


TABLES = {
    DOCS / "architecture.md": ("modules", module_table),
    DOCS / "configuration.md": ("options", option_table),
}


def table_at(page: Path, name: str) -> tuple[str, int, int]:
    """A page's text, and where its table begins and ends."""
    text = page.read_text(encoding="utf-8")
    start = text.index("\n", text.index(f"<!-- {name}:")) + 1
    return text, start, text.index("<!-- end -->", start)


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_tables_are_what_the_code_says(page: Path) -> None:
    name, table = TABLES[page]
    text, start, end = table_at(page, name)
    assert text[start:end].strip() == table(), "`make format` writes it anew"


def test_every_module_says_what_it_is_for() -> None:
    silent = [file for name in FOLDERS for file in modules(ROOT / name) if not summary(file)]
    assert silent == []


def test_the_table_of_options_can_be_copied_from() -> None:
    """What a value looks like stands beside the option; no default is empty or in raw bytes."""
    table = option_table()
    assert "`--lora-modules NAME=PATH`" in table
    assert "`--root-path /PREFIX`" in table
    assert "``" not in table
    assert not re.search(r"`\d{7,}`", table)
    for options in serve_options().values():
        for option in options:
            if option.metavar == "SIZE":
                assert re.search(r"default: (auto|\d+[GM]iB)", option.help), option.opts


def test_every_option_of_serve_is_explained() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    options = [
        name
        for group in serve_options().values()
        for each in group
        for name in each.opts
        if name.startswith("-")
    ]
    assert len(options) > 40
    assert [name for name in options if not re.search(f"`{name}[ `]", text)] == []


def test_the_readme_is_read_in_a_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        anchors = []
        if file.is_file() and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
        if not file.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    assert broken == []


def test_the_example_of_a_family_is_what_the_repository_has() -> None:
    """The file is quoted whole, and the row as it is."""
    text = (DOCS / "adding-a-model.md").read_text(encoding="utf-8")
    file, row = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert file == (ROOT / "models/qwen3.py").read_text(encoding="utf-8")
    assert row in (ROOT / "tests/models/families.py").read_text(encoding="utf-8").replace(
        "\n    ", "\n"
    )


def write_tables() -> None:
    for page, (name, table) in TABLES.items():
        text, start, end = table_at(page, name)
        page.write_text(f"{text[:start]}\n{table()}\n\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    write_tables()
