"""Random comparisons of the emulated kernels: ``random_checks.py --seconds 300 --seed 1``.

Every seed is one problem, seed, seed + 1, … in turn: a kernel, its sizes and options, and the order
of things it runs in. One JSON object a line for each comparison; what fails is repeated by

    random_checks.py --capability 90 --only 1234

Ends with status 1 where a comparison was wrong or a kernel did not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from random import Random
from typing import Any

import torch
from checks import LIMIT, error
from draws import DRAWS, WEIGHTS
from launch import emulated
from machine import WARP, Timing
from tensor_cores import WARP_GROUP


def drawn_family(seed: int) -> tuple[Random, str]:
    """What draws a seed's problem, and of which kernel it is."""
    pick = Random(seed)
    (family,) = pick.choices(list(DRAWS), [WEIGHTS.get(name, 1) for name in DRAWS])
    return pick, family


def comparisons(seed: int, capability: int, without: str) -> Iterator[dict[str, Any]]:
    """A seed's comparisons; an exception is one that failed."""
    pick, family = drawn_family(seed)
    torch.manual_seed(seed)
    unit = WARP_GROUP if capability >= 90 else WARP
    timing = Timing(
        pick.choice((0, unit)),
        apart=capability >= 100,
        backwards=pick.random() < 0.5,
        late=pick.random() < 0.5,
        seed=pick.randrange(1000),
    )
    case = {"seed": seed, "capability": capability, "family": family}
    try:
        with emulated(capability, timing, without), torch.inference_mode():
            for name, found, expected in DRAWS[family](pick, capability):
                measured, limit = error(found, expected), LIMIT[found.dtype]
                yield {**case, "name": name, "error": measured, "limit": limit}
    except Exception:
        yield {**case, "name": traceback.format_exc(), "error": float("inf"), "limit": 0.0}


def run(
    capability: int, first: int, only: list[int], seconds: float, families: list[str], without: str
) -> list[bool]:
    """Print comparisons as they come; whether each was right."""
    warnings.simplefilter("ignore")  # of bfloat16 gradients and the like: nothing of ours
    torch.set_num_threads(1)
    deadline = time.monotonic() + seconds
    right = []
    for seed in only or count(first):
        if not only and time.monotonic() > deadline:
            break
        if drawn_family(seed)[1] not in families:
            continue
        for each in comparisons(seed, capability, without):
            right.append(each["error"] <= each["limit"])  # NaN is wrong too
            print(json.dumps(each | {"right": right[-1]}), flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="*", default=(80, 89, 90, 100))
    parser.add_argument("--families", nargs="*", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--seed", type=int, default=0, help="the first problem")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="no others than these")
    parser.add_argument("--seconds", type=float, default=60, help="for each GPU: begin none after")
    parser.add_argument("--without", default="", help="leave this instruction out")
    arguments = parser.parse_args()
    a = arguments
    options = (a.seed, a.only, a.seconds, a.families, a.without)
    # A process compiles for one GPU.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        done = [pool.submit(run, capability, *options) for capability in arguments.capability]
        right = [each for future in done for each in future.result()]
    print(f"{len(right)} comparisons, {right.count(False)} wrong", file=sys.stderr)
    return 0 if right and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
