"""pytest plugin: vLLM's tests of its OpenAI server, whose servers become ours.

The tests' ``tests.utils`` and what they import of ``vllm`` are replaced: a server is ours under the
name of the model, a tokenizer is the tiny model's, a downloaded adapter the tiny one. All else of
``vllm`` is a stand-in of no use: a test that uses it does not apply.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from live_server import Pool, models  # type: ignore[import-not-found]
from suite_table import Outcome  # type: ignore[import-not-found]

_POOL = Pool()
# vLLM's flags that are ours as well.
_SHARED = {
    "--enable-lora", "--max-lora-rank", "--max-loras", "--lora-modules", "--root-path", "--api-key",
    "--uds",
}  # fmt: skip
_OWN = "it calls classes of vLLM's own"
# A random model seldom ends by itself: many tests go on to the end of the context. Those of the
# servers with these flags do not, and need it: a prompt has 10,000 of the tiny model's tokens.
_CONTEXT = 3072
_CONTEXTS = {"--enable-chunked-prefill": 12288, "--enable-tokenizer-info-endpoint": 8192}


class RemoteOpenAIServer:
    """Stands for vLLM's class of this name."""

    DUMMY_API_KEY = "none"

    def __init__(
        self, model: str, cli_args: list[str], env_dict: dict[str, str] | None = None, **_: Any
    ) -> None:
        flags, names, context = _translated([str(argument) for argument in cli_args])
        environment = env_dict or {}
        if key := environment.get("VLLM_API_KEY"):
            flags.append(f"--api-key={key}")
        if "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in environment:
            flags += [f"--admin-key={self.DUMMY_API_KEY}", f"--lora-root={tempfile.gettempdir()}"]
        served = [f"--served-model-name={name}" for name in names or [model]]
        self._url = _POOL.url(*served, *flags, f"--max-model-len={context}")
        self.host, _, port = self._url.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def url_root(self) -> str:
        return self._url

    def url_for(self, *parts: str) -> str:
        return "/".join((self._url, *parts))

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._client(options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._client(options))

    def _client(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "base_url": self.url_for("v1"),
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            "timeout": 600,
        } | options


def _translated(arguments: list[str]) -> tuple[list[str], list[str], int]:
    """Our flags, sorted so that equal servers are shared; the served names; the context."""
    flags: list[str] = []
    names: list[str] = []
    context = max((_CONTEXTS.get(flag, _CONTEXT) for flag in arguments), default=_CONTEXT)
    at = 0
    while at < len(arguments):
        flag, _, joined = arguments[at].partition("=")
        at += 1
        values = [joined] if joined else []
        while at < len(arguments) and not arguments[at].startswith("--"):
            values.append(arguments[at])
            at += 1
        if flag == "--served-model-name":
            names += values
        elif flag == "--max-model-len":
            asked = int(values[0])
            context = context if context > _CONTEXT else min(context, asked)
        elif flag in _SHARED:
            flags += [f"{flag}={value}" for value in values] or [flag]
    return sorted(flags), names, context


class _Absent(type):
    """The class of what stands for vLLM's own classes and functions: whoever uses it is skipped."""

    def __call__(cls, *_: object, **__: object) -> Any:
        pytest.skip(_OWN, allow_module_level=True)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(_OWN, allow_module_level=True)

    def __add__(cls, _: object) -> Any:
        pytest.skip(_OWN)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every module of ``vllm``, of stand-ins."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _KNOWN.get(name) or _Absent(name, (), {})


def _get_tokenizer(*_: object, **__: object) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models().model)


_KNOWN: dict[str, Any] = {
    "get_tokenizer": _get_tokenizer,
    "hf_api": lambda: SimpleNamespace(snapshot_download=lambda **_: str(models().adapter)),
    "current_platform": SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: False),
    "VLLMValidationError": ValueError,
}


def _install() -> None:
    """At the import of this plugin: their conftest.py files are read before anything is called."""
    sys.meta_path.insert(0, _Finder())
    utils: Any = ModuleType("tests.utils")
    utils.RemoteOpenAIServer = RemoteOpenAIServer
    utils.ROCM_EXTRA_ARGS, utils.ROCM_ENV_OVERRIDES = [], {}
    sys.modules["tests.utils"] = utils


_install()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcome(Path(__file__).with_name("vllm.toml")))


def pytest_sessionfinish() -> None:
    _POOL.close()
