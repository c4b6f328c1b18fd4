"""Fixtures that every folder of tests may use."""

import functools
import gc
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# Triton reads this when it is first imported, so it is set before any test imports torch: kernels
# in the test process run in the interpreter, on the CPU. The proof on a GPU is `make gpu`.
os.environ["TRITON_INTERPRET"] = "1"
# Likewise OpenMP, when torch loads it: threads that spin while they wait for each other take, where
# processors are shared, many times as long for the small tensors here as the work itself.
os.environ["OMP_WAIT_POLICY"] = "passive"
# One thread each if several processes run tests: they share the processors. Tests of threads ask
# for them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# To import and collect makes no garbage to speak of, and to look for it takes a third of the time.
gc.disable()


@functools.cache
def _module(name: str) -> ModuleType:
    """A module beside this file, loaded by path.

    With `tests/` on sys.path, `tests/kernels` would answer `import kernels`, which transformers and
    bitsandbytes try. Loaded at first use: the process that only hands out tests needs none.
    """
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"nybble_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config: pytest.Config) -> None:
    """Fewer random examples where the slow tests are left out; 100 in `make test-all`.

    Tests that say how many they try always try as many.
    """
    settings.register_profile("quick", max_examples=20)
    if config.getoption("markexpr") == "not slow":
        settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test may take an hour; pyproject.toml says how long the others may.

    The files that wait longest come first, or else they would end last and alone.
    """
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))
    items.sort(key=lambda item: item.path.name not in ("test_jobs.py", "test_console.py"))


@pytest.fixture(scope="session", autouse=True)
def products_are_as_of_tensor_cores() -> Iterator[None]:
    """An element of an interpreted product is the same wherever in the block it stands."""
    with pytest.MonkeyPatch.context() as patch:
        if interpreter := sys.modules.get("triton.runtime.interpreter"):  # a test has a kernel
            from nybble.kernels.bench.interpreted import dot_in_float64

            builder = interpreter.InterpreterBuilder
            patch.setattr(builder, "create_dot", dot_in_float64(interpreter))
        yield


def pytest_collection_finish() -> None:
    """From here on there is garbage; what was imported is none, and is not looked through again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def interpreter_does_nothing_in_vain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if interpreter := sys.modules.get("triton.runtime.interpreter"):
            _module("interpreter").spare(interpreter, patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def the_standard_library_is_read_and_tokenized_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """All of it is, wherever a test calibrates or evaluates with the text that there is.

    Its tokens are in a folder that all processes of a run share.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        if corpus := sys.modules.get("nybble.quantizers.corpus"):
            import torch

            given, library = corpus.token_ids, functools.cache(corpus.standard_library_text)

            @functools.cache
            def stored_ids(tokenizer: str, text: str) -> Path:
                digest = hashlib.sha256(tokenizer.encode() + text.encode()).hexdigest()
                return folder / f"tokens-{digest}.pt"

            def token_ids(tokenizer: Any, text: str) -> Any:
                if len(text) < 1_000_000:
                    return given(tokenizer, text)
                path = stored_ids(tokenizer.backend_tokenizer.to_str(), text)
                with FileLock(f"{path}.lock"):
                    if not path.exists():
                        torch.save(given(tokenizer, text), path)
                return torch.load(path)

            patch.setattr(corpus, "token_ids", token_ids)
            patch.setattr(corpus, "standard_library_text", library)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_thread_is_left_at_work() -> Iterator[None]:
    """A thread that a test leaves behind and that never waits makes all later tests slow."""
    yield
    before = _processor_ticks()
    time.sleep(0.3)
    busy = {id for id, ticks in _processor_ticks().items() if ticks - before.get(id, 0) > 8}
    frames = sys._current_frames()
    left = [
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.native_id in busy and thread.ident in frames
    ]
    assert not left, "still at work after the last test:\n" + "\n".join(left)


def _processor_ticks() -> dict[int, int]:
    """Hundredths of a second that each thread of this process has computed; Linux has them."""
    found = {}
    for stat in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            found[int(stat.parent.name)] = int(user) + int(system)
    return found


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """tests/reference.py: what transformers computes, and what the decoder and engine do."""
    return _module("reference")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(**options)`` is the folder of a tiny model; see ``write_tiny_model``.

    Folders are built once per set of options and shared: do not write to them.
    """
    built: dict[tuple[tuple[str, object], ...], Path] = {}

    def build(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in built:
            built[key] = _module("tiny").write_tiny_model(
                tmp_path_factory.mktemp("tiny"), **options
            )
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``tiny_adapter(family, **options)`` is the folder of a LoRA trained on that tiny model.

    tied: whether that model's output layer is its embedding. See ``write_tiny_adapter``. Folders
    are shared: do not write to them.
    """
    built: dict[str, Path] = {}

    def build(family: str = "qwen2", *, tied: bool = False, **options: object) -> Path:
        key = repr((family, tied, sorted(options.items())))
        if key not in built:
            model = tiny_model(family=family, tie_word_embeddings=tied)
            built[key] = _module("tiny").write_tiny_adapter(
                tmp_path_factory.mktemp("adapter"), model, **options
            )
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_token_adapter(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``tiny_token_adapter(**options)`` is the folder of a LoRA with tokens of its own.

    tied: as of ``tiny_adapter``. See ``write_tiny_token_adapter``. Folders are shared: do not write
    to them.
    """
    built: dict[str, Path] = {}

    def build(*, tied: bool = False, **options: object) -> Path:
        key = repr((tied, sorted(options.items())))
        if key not in built:
            model = tiny_model(tie_word_embeddings=tied)
            built[key] = _module("tiny").write_tiny_token_adapter(
                tmp_path_factory.mktemp("adapter"), model, **options
            )
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_eagle3() -> Callable[..., Path]:
    """``tiny_eagle3(folder, target, **options)`` writes a head of a tiny model to ``folder``.

    See ``write_tiny_eagle3``.
    """
    return _module("tiny").write_tiny_eagle3  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tiny_mtp() -> ModuleType:
    """tests/tiny.py, for ``write_tiny_mtp`` and ``store_tiny_mtp``."""
    return _module("tiny")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
