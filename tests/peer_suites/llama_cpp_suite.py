"""pytest plugin: llama.cpp's server tests, whose servers become ours.

Paths get their ``/v1``. llama-server's own ``/completion``, ``/tokenize``, ``/detokenize`` and
``/apply-template`` are asked for under OpenAI's and vLLM's names, as far as those have the same.
What has no counterpart skips the test. Of a text which a certain model would write only the type is
looked at.
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
_MAPPED = {"model_alias", "no_ui", "n_ctx", "n_slots", "api_key", "chat_template_file"}
_OWN = {
    "/chat/completions/input_tokens", "/embedding", "/infill", "/lora-adapters", "/props", "/slots",
    "/v1/messages",
}  # fmt: skip
# Their names for the fields of a request, and ours.
_COMPLETION = {
    "prompt": "prompt", "n_predict": "max_tokens", "seed": "seed", "temperature": "temperature",
    "logit_bias": "logit_bias", "stream": "stream",
}  # fmt: skip
_TOKENIZE = {
    "content": "prompt", "add_special": "add_special_tokens", "with_pieces": "return_token_strs",
}  # fmt: skip
# Of a chat's fields, those that its prompt is made of.
_RENDERED = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
# How the expressions begin that look for the words of a certain model.
_WORDS = ("(going", "(Suddenly", "(little", "Sure, here")
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
    # Theirs, which their conftest.py has imported.
    import utils  # type: ignore[import-not-found]

    process = utils.ServerProcess
    ask, stream, match = process.make_request, process.make_stream_request, utils.match_regex

    def make_request(
        self: Any, method: str, path: str, data: Any = None, *more: Any, **options: Any
    ) -> Any:
        if path == "/completion":
            answer = ask(self, method, "/completions", _completion(self, data), *more, **options)
            if answer.status_code == 200:
                texts = [{"content": choice["text"]} for choice in answer.body["choices"]]
                answer.body = texts[0] if len(texts) == 1 else texts
        elif path == "/tokenize":
            answer = ask(self, method, path, _tokenize(data), *more, **options)
            if answer.status_code == 200 and (pieces := answer.body["token_strs"]):
                pairs = zip(answer.body["tokens"], pieces, strict=True)
                answer.body["tokens"] = [{"id": token, "piece": piece} for token, piece in pairs]
        elif path == "/apply-template":
            answer = ask(self, method, "/tokenize", data, *more, **options)
            if answer.status_code == 200:
                tokens = {"tokens": answer.body["tokens"]}
                answer = ask(self, method, "/detokenize", tokens, *more, **options)
        elif path == "/detokenize":
            answer = ask(self, method, path, data, *more, **options)
            answer.body = {"content": answer.body["prompt"]}
        else:
            answer = ask(self, method, path, data, *more, **options)
            if path == "/chat/completions" and self.debug and answer.status_code == 200:
                # llama-server's own field, in the part of it that tests look at.
                chat = {name: value for name, value in data.items() if name in _RENDERED}
                shown = make_request(self, "POST", "/apply-template", chat)
                answer.body["__verbose"] = {"prompt": shown.body["prompt"]}
        return answer

    def make_stream_request(
        self: Any, method: str, path: str, data: Any = None, *more: Any, **options: Any
    ) -> Any:
        if path != "/completion":
            yield from stream(self, method, path, data, *more, **options)
            return
        for event in stream(self, method, "/completions", _completion(self, data), *more):
            choice = event["choices"][0]
            yield {"content": choice["text"], "stop": choice["finish_reason"] is not None}

    def match_regex(regex: str, text: str) -> bool:
        return isinstance(text, str) if regex.startswith(_WORDS) else match(regex, text)

    utils.match_regex = match_regex
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
    if template := asked.get("chat_template_file"):  # seen from the folder of the tests
        import utils

        options.append(f"--chat-template={(Path(utils.__file__).parent / template).resolve()}")
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


def _completion(self: Any, data: dict[str, Any]) -> dict[str, Any]:
    """A request for /completion as one for OpenAI's completions, with the server's own defaults."""
    asked = {name: value for name, value in data.items() if name != "cache_prompt"}
    if unknown := sorted(asked.keys() - _COMPLETION.keys()):
        pytest.skip(f"OpenAI's completions have no {', '.join(unknown)}")
    bias = asked.get("logit_bias", {})
    if isinstance(bias, list) or any(isinstance(token, str) for token in bias):
        pytest.skip("OpenAI's logit_bias is an object of token ids")
    defaults = {"n_predict": self.n_predict, "seed": self.seed, "temperature": self.temperature}
    return {_COMPLETION[name]: value for name, value in {**defaults, **asked}.items()}


def _tokenize(data: dict[str, Any]) -> dict[str, Any]:
    asked = {"add_special": False, **data}
    return {_TOKENIZE[name]: value for name, value in asked.items()}
