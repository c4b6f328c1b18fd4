"""pytest plugin: llama.cpp's server tests, whose servers become ours.

Paths get their ``/v1``, and requests a model's name, which llama-server does not ask for. An option
of llama-server that has no counterpart skips the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from live_server import Pool  # type: ignore[import-not-found]
from suite_table import Outcome  # type: ignore[import-not-found]

_POOL = Pool()
# Of the tests' ServerProcess: what changes nothing that these tests look at.
_LEFT_OUT = {
    "debug", "server_port", "server_host", "model_hf_repo", "model_hf_file", "temperature", "seed",
    "offline", "n_threads", "n_gpu_layer", "n_batch", "n_ubatch", "n_predict", "n_prompts",
    "cache_prompt", "server_continuous_batching", "server_embeddings", "server_metrics",
    "kv_unified", "swa_full", "fa", "jinja", "log_path", "process", "external_server",
    "ready", "pooling", "reasoning_format", "reasoning",
}  # fmt: skip
_MAPPED = {"model_alias", "no_ui", "n_ctx", "n_slots", "api_key"}
_OWN = {
    "/apply-template", "/chat/completions/input_tokens", "/completion", "/detokenize", "/embedding",
    "/infill", "/lora-adapters", "/props", "/slots", "/tokenize", "/v1/messages",
}  # fmt: skip
# Those that the tests give to OpenAI's client, which llama-server does not look at.
_NAMES = (
    "default", "gpt-3.5-turbo-instruct", "gpt-4.1", "davinci-002", "text-embedding-3-small",
)  # fmt: skip
_OF_OPENAI = (
    "/chat/completions", "/completions", "/responses", "/embeddings", "/models",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcome(Path(__file__).with_name("llama_cpp.toml")))


def pytest_sessionstart() -> None:
    import utils  # type: ignore[import-not-found]  # theirs, which their conftest.py has imported

    process = utils.ServerProcess
    ask, stream = process.make_request, process.make_stream_request

    def make_request(
        self: Any, method: str, path: str, data: Any = None, *more: Any, **options: Any
    ) -> Any:
        return ask(self, method, path, _named(path, data), *more, **options)

    def make_stream_request(
        self: Any, method: str, path: str, data: Any = None, *more: Any, **options: Any
    ) -> Any:
        return stream(self, method, path, _named(path, data), *more, **options)

    process.start, process.stop = _start, lambda self: None
    process.make_request, process.make_stream_request = make_request, make_stream_request
    process.make_url = _make_url
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def pytest_sessionfinish() -> None:
    _POOL.close()


def _start(self: Any, timeout_seconds: int = 60) -> None:
    asked = {name: value for name, value in vars(self).items() if value not in (None, False)}
    for name in asked.keys() - _LEFT_OUT - _MAPPED:
        pytest.skip(f"llama-server's option {name} has no counterpart")
    names = [asked.get("model_alias") or _NAMES[0], *_NAMES]
    options = [f"--served-model-name={name}" for name in dict.fromkeys(names)]
    if context := asked.get("n_ctx"):
        options.append(f"--max-model-len={context // asked.get('n_slots', 1)}")
    if asked.get("no_ui"):
        options.append("--no-console")
    if key := asked.get("api_key"):
        options.append(f"--api-key={key}")
    host, _, port = _POOL.url(*options).removeprefix("http://").rpartition(":")
    self.server_host, self.server_port = host, int(port)


def _make_url(self: Any, path: str, host: str | None = None) -> str:
    if path.partition("?")[0] in _OWN:
        pytest.skip(f"llama-server's own endpoint {path.partition('?')[0]}")
    prefix = "/v1" if path.startswith(_OF_OPENAI) else ""
    return f"http://{host or self.server_host}:{self.server_port}{prefix}{path}"


def _named(path: str, data: Any) -> Any:
    if not path.endswith(_OF_OPENAI) or not isinstance(data, dict):
        return data
    return data | {"model": _NAMES[0]}
