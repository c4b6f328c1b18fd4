"""Everything there is to measure on a GPU, section by section.

    python kernels/bench/gpu.py [--only checks,decode] [--scale 1] [--out DIR] [--dry-run]

Each section is a process with a time budget of its own: what begins nothing new after it, and is
stopped after twice as long. One that crashes or hangs loses its own remaining tables only, and the
next one runs. Results are written as JSON as they come, a file a section. The exit code is 1 where
a check failed or a section did not end well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Minutes, in the order of worth: are the kernels right, what do they add up to, and why.
SECTIONS = {"checks": 4.0, "decode": 4.0, "matmul": 6.0, "attention": 4.0, "lora": 2.0, "step": 2.0}


def run(name: str, minutes: float, out: Path, dry: bool) -> str:
    """Run one section and say how it ended."""
    script = Path(__file__).with_name(f"gpu_{name}.py")
    command = [sys.executable, str(script), "--minutes", f"{minutes:.2f}", "--out", str(out)]
    if dry:
        command.append("--dry-run")
    print(f"\n=== {name}: up to {minutes:.1f} minutes ===", flush=True)
    start = time.monotonic()
    try:
        # Twice its time, and two minutes for the first compilation.
        code = subprocess.run(command, timeout=120 * minutes + 120, check=False).returncode
    except subprocess.TimeoutExpired:
        return "FAILED: stopped, far over its time"
    taken = f"{time.monotonic() - start:.0f} s"
    return f"ok, {taken}" if code == 0 else f"FAILED with exit code {code}, {taken}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--scale", type=float, default=1.0, help="of every section's minutes")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/results"))
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, on the CPU")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    ends = {
        name: run(name, arguments.scale * SECTIONS[name], arguments.out, arguments.dry_run)
        for name in names
    }
    print()
    for name, end in ends.items():
        print(f"{name}: {end}")
    print(f"results: {arguments.out}")
    return 1 if any(end.startswith("FAILED") for end in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
