"""``python -m nybble.server.replicas.one …``: one server, which ends with the process above it."""

from __future__ import annotations

import ctypes
import signal
import sys

from nybble.server.cli.main import serve_main

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve, and stop as after SIGTERM once the supervisor is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    serve_main()


if __name__ == "__main__":
    main()
