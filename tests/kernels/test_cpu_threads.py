"""The threads of the CPU kernels: every task is done once, whoever calls and however often."""

import subprocess
from pathlib import Path

import pytest

from nybble.kernels.cpu import build
from nybble.kernels.cpu.build import default_compiler

_DRIVER = Path(__file__).with_name("pool_driver.cpp")
_KERNELS = Path(build.__file__).parent


@pytest.mark.parametrize("options", [("-O2",), ("-O1", "-fsanitize=thread")], ids=" ".join)
def test_each_task_is_done_once_by_several_callers_and_in_a_forked_process(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    """With the thread sanitizer it is also found whether two threads touch something at once."""
    driver = tmp_path / "driver"
    sources = _DRIVER, _KERNELS / "threads.cpp"
    flags = "-std=c++17", "-pthread", f"-I{_KERNELS}"
    subprocess.run([default_compiler(), *options, *flags, *sources, "-o", driver], check=True)
    result = subprocess.run([driver], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
