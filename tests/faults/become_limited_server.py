"""As become_server.py, on a disk that is full: no file grows beyond FILE_LIMIT bytes."""

from __future__ import annotations

import resource
import runpy
import sys
from pathlib import Path

given = globals()["given"]
limit = int(given[1]["FILE_LIMIT"])
sys.dont_write_bytecode = True  # compiled modules would be cut off
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
forked = Path(__file__).parents[1] / "server/become_server.py"
runpy.run_path(str(forked), {"given": given}, "__main__")
