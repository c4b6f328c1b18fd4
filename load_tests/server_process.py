"""Runs ``nybble serve`` as a process of its own, and writes random adapters for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from nybble.loaders import open_checkpoint, resolve_model
from nybble.models import architecture_of

_SERVE = [sys.executable, "-P", "-c", "from nybble.server.cli.main import serve_main; serve_main()"]


@contextmanager
def running_server(model: str, *options: str, cores: int | None = None) -> Iterator[str]:
    """Yield the URL (…/v1) once the server is ready. cores: how many it may use; None for all."""
    available = sorted(os.sched_getaffinity(0))
    chosen = available[-(cores or len(available)) :]
    command = ["taskset", "-c", ",".join(map(str, chosen)), *_SERVE, "--model", model]
    process = subprocess.Popen(
        [
            *command,
            "--served-model-name",
            "base",
            "--port",
            "0",
            "--log-level",
            "warning",
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(len(chosen))},
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if match := re.search(r"http://\S+/v1", line):
                # Keep reading: the server would block on a full pipe.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield match[0]
                return
        raise RuntimeError("the server did not start:\n" + "".join(said))
    finally:
        process.terminate()
        process.wait()


def write_adapters(
    folder: Path, model: str, count: int, targets: Sequence[str], ranks: Sequence[int] = (16, 8)
) -> list[str]:
    """Random adapters in PEFT's layout, one folder each; returns their names.

    ranks: the first adapter has the first rank, and so on in turns.
    """
    linears = architecture_of(open_checkpoint(resolve_model(model)).config).linears
    generator = torch.Generator().manual_seed(0)
    names = []
    for index in range(count):
        rank = ranks[index % len(ranks)]
        path = folder / f"adapter-{index:04}"
        path.mkdir(parents=True)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": list(targets),
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for name, each in linears.items():
            if each.leaf in targets:
                prefix = f"base_model.model.{name}.lora_"
                a = torch.randn(rank, each.inputs, generator=generator)
                b = torch.randn(each.out, rank, generator=generator) * 1e-3
                tensors[prefix + "A.weight"], tensors[prefix + "B.weight"] = a.half(), b.half()
        save_file(tensors, path / "adapter_model.safetensors")
        names.append(path.name)
    return names
