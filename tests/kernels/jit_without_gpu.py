"""Takes the matmul through Triton's launcher, with a stand-in for the driver, up to the launch.

Prints, for each kernel launched, its name and how many versions of it have been compiled so far.
Run in a process of its own, without TRITON_INTERPRET.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nybble.kernels.triton import matmul, tune

ROWS = (9, 12, 16, 1, 2)


class StandInDriver:
    """Answers what the launcher asks before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(StandInDriver())
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        compiled = launch(self, *args, **{**options, "warmup": True})
        print(self.__name__, len(self.device_caches[0][0]))
        return compiled

    JITFunction.run = compile_only
    weight = next(iter(tune.random_weights(256, 192, torch.device("cpu"))))
    for rows in ROWS:
        matmul.packed_matmul(torch.randn(rows, 256).bfloat16(), weight)


if __name__ == "__main__":
    main()
