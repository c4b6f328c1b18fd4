"""Which functions of the project a decode step passes through, and in how many files.

    python engine/bench/call_path.py MODEL_FOLDER [--list]

A decode step is one step of the engine thread in which one sequence takes its next token.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class Passed:
    """Code of the project that ran, in the order in which it was first called."""

    def __init__(self) -> None:
        self.codes: dict[CodeType, None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.codes.setdefault(frame.f_code)

    def functions(self) -> list[tuple[str, str]]:
        """(file, function); comprehensions and generators' expressions count as their function."""
        found: dict[tuple[str, str], None] = {}
        for code in self.codes:
            file = Path(code.co_filename).resolve()
            if file.is_relative_to(ROOT) and ".venv" not in file.parts and "<" not in code.co_name:
                found[str(file.relative_to(ROOT)), code.co_qualname] = None
        return list(found)


def decode_step(folder: Path) -> Passed:
    """One decode step, on a thread of its own that begins once a prompt has been read."""
    from nybble.engine import Engine, EngineConfig, Request, SamplingParams
    from nybble.loaders import open_checkpoint

    config = EngineConfig(dtype=torch.bfloat16, kv_cache_bytes=1 << 24, max_num_seqs=4)
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    thread = engine._thread
    passed, steps = Passed(), 0
    step = thread._step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        if steps != 5:  # a step in the middle of decoding
            return step()
        sys.setprofile(passed)
        try:
            return step()
        finally:
            sys.setprofile(None)

    thread._step = counted  # type: ignore[method-assign]
    engine.start()

    async def run() -> None:
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        async for _ in engine.generate(Request("r", tuple(range(5, 15)), params)):
            pass

    asyncio.run(run())
    engine.stop()
    return passed


def show(name: str, passed: Passed, every: bool) -> None:
    functions = passed.functions()
    files = dict.fromkeys(file for file, _ in functions)
    print(f"{name}: {len(functions)} functions in {len(files)} files")
    if every:
        for file in files:
            print(f"  {file}: {', '.join(f for at, f in functions if at == file)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--list", action="store_true", help="name the functions")
    args = parser.parse_args()
    show("decode step", decode_step(args.model), args.list)


if __name__ == "__main__":
    main()
