"""A device that cannot be used is refused with a reason before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from nybble.engine import resolve_device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("build", "available", "name", "capability", "reason"),
    [
        (None, False, "cuda", (9, 0), "is for the CPU"),
        ("13.0", False, "cuda", (9, 0), "no usable NVIDIA GPU"),
        ("13.0", True, "cuda:2", (9, 0), "has 2 GPU"),
        ("13.0", True, "cuda:1", (7, 5), "compute capability 7.5"),
        ("13.0", True, "cuda:1", (10, 0), "install Triton 3.7.1 or newer"),
        ("13.0", True, "cuda:1", (9, 0), None),
        ("13.0", True, "auto", (8, 6), None),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(
    monkeypatch: pytest.MonkeyPatch,
    build: str | None,
    available: bool,
    name: str,
    capability: tuple[int, int],
    reason: str | None,
) -> None:
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    if reason is None:
        assert resolve_device(name).type == "cuda"
    else:
        with pytest.raises(ValueError, match=reason):
            resolve_device(name)
