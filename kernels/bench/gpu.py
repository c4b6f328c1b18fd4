"""All GPU measurements, section by section.

    python kernels/bench/gpu.py [--only checks,decode] [--minutes 8.5] [--out DIR] [--dry-run]

The sections share the minutes; time that one does not use goes to the next ones. Each section is a
process. It begins nothing new once its time is over, and is killed if it still runs well after
that. If one crashes or hangs, only its own remaining tables are lost, and the next one runs.
Results are written as they come, as one JSON file per section. The exit code is 1 if a check or a
section failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Share of the time of each section. They run in order of importance: whether the kernels are
# correct, how fast a whole decode step is, and then the single kernels.
SECTIONS = {"checks": 4, "decode": 4, "ranks": 2, "matmul": 6, "attention": 4, "lora": 2, "step": 2}
_GRACE_SECONDS = 30  # for the process to start, and to finish what it has begun


def run(name: str, seconds: float, limit: float, out: Path, dry: bool) -> str:
    """Run one section and say how it ended; it is killed after ``limit`` seconds."""
    script = Path(__file__).with_name(f"gpu_{name}.py")
    command = [sys.executable, str(script), "--minutes", f"{seconds / 60:.2f}", "--out", str(out)]
    if dry:
        command.append("--dry-run")
    print(f"\n=== {name}: up to {seconds:.0f} s ===", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return "FAILED: stopped, far over its time"
    taken = f"{time.monotonic() - start:.0f} s"
    return f"ok, {taken}" if code == 0 else f"FAILED with exit code {code}, {taken}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all sections together")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/results"))
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, on the CPU")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    end = time.monotonic() + 60 * arguments.minutes
    ends: dict[str, str] = {}
    for i, name in enumerate(names):
        left = end - time.monotonic()
        seconds = left * SECTIONS[name] / sum(SECTIONS[later] for later in names[i:])
        if seconds < _GRACE_SECONDS and not arguments.dry_run:
            ends[name] = "FAILED: no time was left"
            continue
        limit = min(1.5 * seconds + _GRACE_SECONDS, left + _GRACE_SECONDS)
        ends[name] = run(name, seconds, limit, arguments.out, arguments.dry_run)
    print()
    for name, how in ends.items():
        print(f"{name}: {how}")
    print(f"results: {arguments.out}")
    return 1 if any(how.startswith("FAILED") for how in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
