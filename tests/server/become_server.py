"""Run in a process forked for ``forked.ForkedServer``: from here on it is ``nybble``.

``given`` is among its globals: the command's arguments and environment, and the pipe which becomes
its standard error.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from nybble.server.cli.main import main

gc.freeze()  # what was imported before is no garbage
given: tuple[list[str], dict[str, str], Connection] = globals()["given"]
arguments, environment, errors = given
os.dup2(errors.fileno(), 2)
errors.close()
os.environ.clear()
os.environ.update(environment)
sys.argv = ["nybble", *arguments]
runpy.run_path(str(Path(__file__).with_name("forked_template_worker.py")))["use"]()
main()
