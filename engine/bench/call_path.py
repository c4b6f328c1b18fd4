"""Which functions of the project a request and a decode step pass through, and in how many files.

    python engine/bench/call_path.py MODEL_FOLDER [--list]

The request is a chat, streamed: from its arrival at the HTTP application to its first token at the
client, with the engine's step that computes it. What another process does is not counted (it
renders the chat template), and neither is what the first request alone does.

The decode step is one step of the engine thread in which one sequence takes its next token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from aiohttp import ClientSession, web

from nybble.engine import Engine, EngineConfig, Request, SamplingParams
from nybble.loaders import open_checkpoint
from nybble.loaders.templates import TemplateRenderer
from nybble.server.app import make_app
from nybble.server.http.gate import Gate
from nybble.server.lifecycle.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "Say something."}],
    "max_tokens": 4,
    "temperature": 0,
    "stream": True,
}

# (file, function), in the order in which they were first called.
Functions = list[tuple[str, str]]


class Recorder:
    """Notes code that is called, on this thread and on those started from now on."""

    def __init__(self) -> None:
        self._codes: dict[CodeType, None] | None = None
        self._wanted: Callable[[int], bool] = lambda thread: True
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def start(self, wanted: Callable[[int], bool] = lambda thread: True) -> None:
        """Note what is called on wanted threads, those of which ``wanted(its ident)`` holds."""
        self._codes, self._wanted = {}, wanted

    def leave_out_this_thread(self) -> None:
        """Note nothing more of the thread that calls."""
        left_out = threading.get_ident()
        self._wanted = lambda thread: thread != left_out

    def stop(self) -> Functions:
        """The project's functions among what was called since :meth:`start`.

        Comprehensions and generators' expressions count as their function.
        """
        codes, self._codes = self._codes, None
        found: dict[tuple[str, str], None] = {}
        for code in codes or ():
            file = Path(code.co_filename).resolve()
            # Code that is made while running has no file: `<string>`.
            inside = code.co_filename[0] != "<" and file.is_relative_to(ROOT)
            inside = inside and ".venv" not in file.parts
            if inside and file != Path(__file__).resolve() and "<" not in code.co_name:
                found[str(file.relative_to(ROOT)), code.co_qualname] = None
        return list(found)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        codes = self._codes
        if event == "call" and codes is not None and self._wanted(threading.get_ident()):
            codes.setdefault(frame.f_code)


async def idle(engine: Engine) -> None:
    """Wait until the request before has been cancelled or has ended."""
    while engine.stats().running:
        await asyncio.sleep(0.01)


def request_path(engine: Engine, recorder: Recorder) -> Functions:
    """The second of two equal requests."""
    step, steps = engine._thread._step, 0

    def first_only() -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            recorder.leave_out_this_thread()
        return step()

    async def first_token(session: ClientSession, url: str) -> None:
        async with session.post(url, json=CHAT) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    if choice["delta"].get("content"):
                        return
        raise RuntimeError("the model said nothing")

    async def run() -> Functions:
        nonlocal steps
        templates = TemplateRenderer()
        templates.start()
        app = make_app(engine, ServerSettings(models=("m",), max_sequences=16), Gate(), templates)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            async with ClientSession() as session:
                url = f"http://{host}:{port}/v1/chat/completions"
                await first_token(session, url)
                await idle(engine)
                steps = 0
                engine._thread._step = first_only  # type: ignore[method-assign]
                recorder.start()
                await first_token(session, url)
                path = recorder.stop()
                await idle(engine)
                return path
        finally:
            engine._thread._step = step  # type: ignore[method-assign]
            await runner.cleanup()
            templates.close()

    return asyncio.run(run())


def decode_path(engine: Engine, recorder: Recorder) -> Functions:
    """A step in the middle of decoding."""
    step, steps = engine._thread._step, 0
    path: Functions = []

    def counted() -> Any:
        nonlocal steps
        steps += 1
        if steps != 5:
            return step()
        own = threading.get_ident()
        recorder.start(lambda thread: thread == own)
        try:
            return step()
        finally:
            path.extend(recorder.stop())

    async def run() -> None:
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        async for _ in engine.generate(Request("r", tuple(range(5, 15)), params)):
            pass

    engine._thread._step = counted  # type: ignore[method-assign]
    asyncio.run(run())
    return path


def show(name: str, path: Functions, every: bool) -> None:
    files = dict.fromkeys(file for file, _ in path)
    print(f"{name}: {len(path)} functions in {len(files)} files")
    if every:
        for file in files:
            print(f"  {file}: {', '.join(function for at, function in path if at == file)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--list", action="store_true", help="name the functions")
    args = parser.parse_args()
    recorder = Recorder()
    config = EngineConfig(dtype=torch.bfloat16, kv_cache_bytes=1 << 24, max_num_seqs=4)
    engine = Engine.load(open_checkpoint(args.model), config, progress=False)
    engine.start()
    show("request, to its first token", request_path(engine, recorder), args.list)
    show("decode step", decode_path(engine, recorder), args.list)
    engine.stop()


if __name__ == "__main__":
    main()
