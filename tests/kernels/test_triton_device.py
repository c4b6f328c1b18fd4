"""What is refused before a kernel is launched: compilers known to make wrong code for a device.

Triton before 3.7.1 leaves out the fence between copies to shared memory and Blackwell's products;
the emulator reads NaN there, GPUs now and then what was there before (pytorch/pytorch#181248).
"""

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux")

from nybble.kernels.triton.device import check_compiler  # noqa: E402


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.0+git5e6c6a1b"])
@pytest.mark.parametrize("capability", [100, 103, 110])
def test_blackwell_needs_a_triton_that_fences_copies(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: int
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ValueError, match=r"install Triton 3\.7\.1 or newer"):
        check_compiler("NVIDIA B200", capability)


@pytest.mark.parametrize(
    ("capability", "version"),
    [(100, "3.7.1"), (100, "3.9.0"), (100, "4.0"), (90, "3.6.0"), (80, "3.6.0"), (120, "3.6.0")],
)
def test_other_pairs_are_taken(
    monkeypatch: pytest.MonkeyPatch, capability: int, version: str
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    check_compiler("a GPU", capability)
