"""The process that trains: ``python -m nybble.server.training.worker SPEC.json``.

It reports on stdout, a JSON object a line: ``{"step": …}`` after each step, at the end
``{"done": …}`` or ``{"failed": …}``. It lives while its stdin is open, so that it ends with the
server that started it, however that one ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

_ORPHANED = 3


def main(spec: Path) -> None:
    # Before anything else, because the imports below take seconds.
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    told = json.loads(spec.read_text())
    os.nice(told["nice"])
    with suppress(OSError):  # out of memory, the kernel must kill the job, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Only reports go to stdout; anything that libraries print goes to the log.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _train(told, reports)
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        from nybble.finetune import DataError

        code, param = "training_failed", None
        if isinstance(error, DataError):
            named = str(error).startswith(str(told["validation"]))
            code, param = "invalid_file", "validation_file" if named else "training_file"
            message = f"line {error.line}: {error.reason}" if error.line else error.reason
        elif type(error).__name__ == "OutOfMemoryError":
            message = (
                "the GPU has too little memory left beside the server: lower max_length or the "
                "server's --kv-cache-memory"
            )
        else:
            message = str(error) or type(error).__name__
        _report(reports, {"failed": {"code": code, "message": message, "param": param}})
        raise


def _train(told: dict[str, Any], reports: TextIO) -> None:
    gc.disable()  # importing makes no garbage, and to look for it takes a sixth of the time
    import torch

    from nybble.finetune import Progress, finetune
    from nybble.finetune.train import CHECKPOINT
    from nybble.server.training.plan import settings_of

    gc.enable()

    torch.set_num_threads(told["threads"])
    out = Path(told["out"])
    resume = (out / CHECKPOINT).is_file()
    if not resume and out.exists():
        for path in out.iterdir():
            path.unlink()  # of a run that ended before its first checkpoint

    def on_step(progress: Progress) -> None:
        _report(reports, {"step": asdict(progress)})

    result = finetune(
        Path(told["base"]),
        Path(told["data"]),
        out,
        settings=settings_of(told["settings"]),
        eval_data=None if told["validation"] is None else Path(told["validation"]),
        resume=resume,
        device=torch.device(told["device"]),
        progress=False,
        on_step=on_step,
    )
    best = next(point for point in result.history if point.step == result.best_step)
    done = {
        "tokens": result.tokens,
        "peak_bytes": result.peak_bytes,
        "base_bytes": result.base_bytes,
        "best": {
            "step": best.step,
            "train_loss": best.train_loss,
            "valid_loss": result.best_eval_loss,
        },
    }
    _report(reports, {"done": done})


def _report(reports: TextIO, report: dict[str, Any]) -> None:
    reports.write(json.dumps(report) + "\n")
    reports.flush()


def _end_with_the_server() -> None:
    # Not through sys.stdin: the interpreter needs its lock to shut down.
    while os.read(0, 1):
        pass
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
