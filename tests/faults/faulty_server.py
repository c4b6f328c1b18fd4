"""``nybble`` with a fault in it: run as a script, with the command's own arguments, or forked.

On SIGUSR1 the engine's next step fails, on SIGUSR2 it finds no memory. Where the first argument is
``--hold-packing``, packing stops after two tensors until SIGHUP.
"""

from __future__ import annotations

import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nybble.engine.runner import ModelRunner
from nybble.loaders import packed_file
from nybble.server.cli.main import main

pending: list[Exception] = []
released = threading.Event()
compute = ModelRunner.run


def run(self: ModelRunner, batch: Any) -> Any:
    if pending:
        raise pending.pop()
    return compute(self, batch)


def held(*arguments: Any, **options: Any) -> Iterator[Any]:
    for index, item in enumerate(track(*arguments, **options)):
        if index == 2:
            released.wait()
        yield item


def fail(*_: object) -> None:
    pending.append(RuntimeError("the device is gone"))


def run_out_of_memory(*_: object) -> None:
    pending.append(torch.OutOfMemoryError("CUDA out of memory"))


ModelRunner.run = run  # type: ignore[method-assign]
signal.signal(signal.SIGUSR1, fail)
signal.signal(signal.SIGUSR2, run_out_of_memory)
given = globals().get("given")  # of a ForkedServer
if given is None and sys.argv[1] == "--hold-packing":
    del sys.argv[1]
    signal.signal(signal.SIGHUP, lambda *_: released.set())
    track = packed_file.track
    packed_file.track = held  # type: ignore[assignment]
if given is None:
    main()
else:
    forked = Path(__file__).parents[1] / "server/become_server.py"
    runpy.run_path(str(forked), {"given": given}, "__main__")
