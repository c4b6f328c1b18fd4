"""As become_server.py: one of `nybble replicas`, which kills itself in its first stream.

The environment says when (NYBBLE_TEST_MOMENT: ``before prepare``, ``after write`` and so on, of
aiohttp's StreamResponse), and names a file: the process which can make it is the one that dies
(NYBBLE_TEST_ONCE).
"""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from nybble.server.replicas.last_words import fork_keeper

environment: dict[str, str] = globals()["given"][1]
moment = environment.pop("NYBBLE_TEST_MOMENT")
once = environment.pop("NYBBLE_TEST_ONCE")


def deadly(name: str) -> Callable[..., Awaitable[Any]]:
    method = getattr(web.StreamResponse, name)

    def die(response: web.StreamResponse, when: str) -> None:
        if moment != f"{when} {name}" or type(response) is not web.StreamResponse:
            return
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    async def call(response: web.StreamResponse, *arguments: Any) -> Any:
        die(response, "before")
        result = await method(response, *arguments)
        die(response, "after")
        return result

    return call


for each in ("prepare", "write", "write_eof"):
    setattr(web.StreamResponse, each, deadly(each))
fork_keeper()
environment |= {key: os.environ[key] for key in os.environ if key.startswith("NYBBLE_LAST")}
runpy.run_path(
    str(Path(__file__).with_name("become_server.py")), {"given": globals()["given"]}, "__main__"
)
