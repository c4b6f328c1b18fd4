"""As become_server.py, with a watched folder whose file system does not answer."""

from __future__ import annotations

import runpy
import sys
import threading
from pathlib import Path

from nybble.server.adapters.watch import AdapterWatch


def scan(self: AdapterWatch) -> None:
    print("the folder is being read", file=sys.stderr, flush=True)
    threading.Event().wait()


AdapterWatch.scan = scan  # type: ignore[method-assign]
runpy.run_path(
    str(Path(__file__).with_name("become_server.py")), {"given": globals()["given"]}, "__main__"
)
