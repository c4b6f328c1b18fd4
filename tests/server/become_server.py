"""Run in a process forked for ``forked.ForkedServer``: from here on it is the ``nybble`` command.

Its globals: ``arguments`` and ``environment`` of the command, and ``errors``, the pipe which becomes
its standard error.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from nybble.server.cli.main import main

arguments: list[str]
environment: dict[str, str]
errors: Connection

os.dup2(errors.fileno(), 2)
errors.close()
os.environ.clear()
os.environ.update(environment)
sys.argv = ["nybble", *arguments]
main()
