"""``serve --config``: a file of options, and flags that win over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nybble.server.cli.main import app


def given(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return path


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been served."""
    calls: list[tuple[Any, ...]] = []

    def launch(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        arguments[2].close()

    monkeypatch.setattr("nybble.server.lifecycle.launch.launch", launch)
    return calls


def test_a_file_has_what_flags_have_and_flags_win(
    tmp_path: Path, launched: list[tuple[Any, ...]]
) -> None:
    config = given(
        tmp_path,
        """
        model = "org/name"
        served-model-name = ["first", "second"]
        port = 0
        max_num_seqs = 7
        max-waiting = 3
        enable-lora = true
        api-key = "one"
        kv-cache-memory = 1048576
        """,
    )
    result = serve("--config", config, "--max-waiting", 5)
    assert result.exit_code == 0, result.output
    source, engine, _, settings = launched[0]
    assert source.model == "org/name"
    assert settings.models == ("first", "second")
    assert settings.api_keys == ("one",)
    assert (engine.max_num_seqs, engine.max_waiting, engine.kv_cache_bytes) == (7, 5, 1 << 20)
    assert engine.adapters is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prt = 1", "there is no option 'prt'; did you mean 'port'?"),
        ("xyzzyx = 1", "there is no option 'xyzzyx'"),
        ("help = true", "there is no option 'help'"),
        ("config = 'x'", "there is no option 'config'"),
        ("port = [1, 2]", "'port' is [1, 2], expected one value"),
        ("port = 80.5", "--port"),
        ("port = true", "'port' is True, expected one value"),
        ("enable-lora = 'yes'", "expected true or false"),
        ("max-num-seqs = 1\nmax_num_seqs = 2", "is there twice"),
        ("[model]\nname = 'x'", "expected one value"),
        ("port 8000", "cannot be read as TOML"),
        ("log-level = 'loud'", "--log-level"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    result = serve("--model", "x", "--config", given(tmp_path, text))
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert expected in words
