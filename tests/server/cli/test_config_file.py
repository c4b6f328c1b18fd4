"""``serve --config``: a file of options, and flags that win over it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nybble.server.cli.main import app
from nybble.server.lifecycle.options import ModelOptions, NetworkOptions, ServeOptions


def given(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return path


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """What would have been served."""
    calls: list[ServeOptions] = []

    def launch(options: ServeOptions, sock: socket.socket) -> None:
        calls.append(options)
        sock.close()

    monkeypatch.setattr("nybble.server.lifecycle.launch.launch", launch)
    monkeypatch.setattr("nybble.server.cli.commands.serve.end_at_once", lambda code: None)
    return calls


def test_a_file_has_what_flags_have_and_flags_win(
    tmp_path: Path, launched: list[ServeOptions]
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
    (options,) = launched
    assert options.model.model == "org/name"
    assert options.served_names == ("first", "second")
    assert (options.network.port, options.keys.api_key) == (0, ["one"])
    memory = options.memory
    assert (memory.max_num_seqs, memory.max_waiting, memory.kv_cache_memory) == (7, 5, 1 << 20)
    assert options.adapters.enable_lora


def test_what_nobody_says_is_what_the_options_class_says(launched: list[ServeOptions]) -> None:
    for model in (("--model", "org/name"), ("org/name",)):
        assert serve(*model, "--port", 0).exit_code == 0
        network = NetworkOptions(port=0)
        assert launched.pop() == ServeOptions(model=ModelOptions(model="org/name"), network=network)


def test_the_argument_is_a_flag_that_wins_too(tmp_path: Path, launched: list[ServeOptions]) -> None:
    config = given(tmp_path, "model = 'another'\nport = 0\nroot-path = '/llm/'")
    assert serve("org/name", "--config", config).exit_code == 0
    assert launched[0].model.model == "org/name"
    assert launched[0].network.root_path == "/llm"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prt = 1", "there is no option 'prt'; did you mean 'port'?"),
        ("xyzzyx = 1", "there is no option 'xyzzyx'"),
        ("help = true", "there is no option 'help'"),
        ("config = 'x'", "there is no option 'config'"),
        ("port = [1, 2]", "'port' is [1, 2], expected one value"),
        ("port = 80.5", "'port' is 80.5: "),
        ("port = true", "'port' is True, expected one value"),
        ("enable-lora = 'yes'", "expected true or false"),
        ("max-num-seqs = 1\nmax_num_seqs = 2", "is there twice"),
        ("[model]\nname = 'x'", "expected one value"),
        ("port 8000", "cannot be read as TOML"),
        ("log-level = 'loud'", "'log-level' is 'loud': "),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    result = serve("--model", "x", "--config", given(tmp_path, text))
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert expected in words
