"""LoRA+ against LoRA: the same base, data, seed and steps, each at the best of several rates.

    python finetune/bench/lora_plus.py BASE OUT [--steps 8] [--rates 1e-4,4e-4,1.6e-3] …

The task: from a function's signature to the first line of its docstring, on Python's standard
library (PSF licence); whole modules are held out, and no docstring is in both parts. What is
compared is how many steps each takes to the held-out loss that LoRA ends with at its best rate.
Writes OUT/lora_plus.json and OUT/lora_plus.png; runs that OUT/runs has are not made again.

Hayou, Ghosh, Yu 2024 recommend B's rate at 16 times A's; here LoRA+'s rates for A are LoRA's over
4 by default, so that the geometric means of A's and B's rates are LoRA's rates.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nybble.finetune import FinetuneSettings, LoraSettings, finetune, plot_losses
from nybble.finetune.train import Point
from nybble.loaders import resolve_model

_PACKAGES = ("", "asyncio", "collections", "email", "http", "importlib", "json", "urllib", "xml")
_LINE = range(24, 90)  # characters of a docstring's first line


@dataclass(frozen=True)
class Run:
    """rate: of A. history: held-out loss per token by step, and the training steps' own."""

    method: str
    rate: float
    ratio: float
    history: tuple[Point, ...]
    seconds: float

    @property
    def measured(self) -> list[tuple[int, float]]:
        return [(p.step, p.eval_loss) for p in self.history if p.eval_loss is not None]

    @property
    def best(self) -> float:
        return min(loss for _, loss in self.measured)

    def steps_to(self, loss: float) -> float | None:
        """Steps to a held-out loss, on the line between the evaluations around it."""
        before = self.measured[0]
        for step, found in self.measured:
            if found <= loss:
                if step == before[0]:
                    return float(step)
                part = (before[1] - loss) / (before[1] - found)
                return before[0] + part * (step - before[0])
            before = step, found
        return None


def described_functions(module: Path) -> list[tuple[str, str]]:
    """Signature and first docstring line of the module's functions and methods."""
    found = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        about = (ast.get_docstring(node) or "").partition("\n")[0]
        if len(about) in _LINE and about[-1] in ".!":
            found.append((f"def {node.name}({ast.unparse(node.args)}):", about))
    return found


def write_data(folder: Path, train: int, held_out: int, seed: int) -> tuple[Path, Path]:
    """Two files of so many examples. Raises ValueError where there are not enough."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for name in _PACKAGES for path in sorted((stdlib / name).glob("*.py"))]
    random.Random(seed).shuffle(modules)
    parts: tuple[list[tuple[str, str]], ...] = ([], [])
    seen: set[str] = set()
    for index, module in enumerate(modules):
        for signature, about in described_functions(module):
            if about not in seen:
                seen.add(about)
                parts[index % 4 == 3].append((signature, about))
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part, count in zip(paths, parts, (train, held_out), strict=True):
        if len(part) < count:
            raise ValueError(f"the standard library has {len(part)} examples, not {count}")
        rows = [
            {"prompt": f'{signature}\n    """', "completion": about + '"""'}
            for signature, about in random.Random(seed).sample(part, count)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    return paths


def run(
    base: Path,
    data: tuple[Path, Path],
    out: Path,
    method: str,
    rate: float,
    args: argparse.Namespace,
) -> Run:
    ratio = args.ratio if method == "LoRA+" else 1.0
    settings = FinetuneSettings(
        lora=LoraSettings(rank=args.rank, alpha=2 * args.rank),
        learning_rate=rate,
        lora_plus=ratio,
        max_steps=args.steps,
        batch_size=args.batch_size,
        accumulation=1,
        max_length=128,
        packing=False,
        eval_every=args.eval_every,
        patience=0,
        gradient_checkpointing=False,
        seed=args.seed,
    )
    content = repr((str(base), [path.read_text() for path in data], settings))
    saved = out / "runs" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not saved.exists():
        print(f"{method}, A's rate {rate:.1e}", file=sys.stderr)
        shutil.rmtree(out / "adapter", ignore_errors=True)
        started = time.monotonic()
        result = finetune(base, data[0], out / "adapter", settings=settings, eval_data=data[1])
        found = {
            "seconds": time.monotonic() - started,
            "history": list(map(asdict, result.history)),
        }
        saved.parent.mkdir(exist_ok=True)
        saved.write_text(json.dumps(found))
    found = json.loads(saved.read_text())
    history = tuple(Point(**point) for point in found["history"])
    return Run(method, rate, ratio, history, found["seconds"])


def rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def report(runs: Sequence[Run], args: argparse.Namespace, out: Path) -> None:
    best = {
        method: min((one for one in runs if one.method == method), key=lambda one: one.best)
        for method in ("LoRA", "LoRA+")
    }
    goal = best["LoRA"].best
    steps = {method: one.steps_to(goal) for method, one in best.items()}
    print(
        f"\n{'method':8} {'rate of A':>10} {'of B':>10} {'best held-out loss':>20} {'seconds':>8}"
    )
    for one in runs:
        print(
            f"{one.method:8} {one.rate:10.1e} {one.rate * one.ratio:10.1e} {one.best:20.4f} "
            f"{one.seconds:8.0f}"
        )
    for method, count in steps.items():
        print(
            f"{method} at its best rate is at LoRA's best held-out loss, {goal:.4f}, "
            + ("never" if count is None else f"after {count:.1f} steps")
        )
    found = {
        "base": str(args.base),
        "settings": {k: v for k, v in vars(args).items() if k not in ("base", "out")},
        "goal": goal,
        "steps_to_goal": steps,
        "runs": [
            {**asdict(one), "history": [asdict(p) for p in one.history], "best": one.best}
            for one in runs
        ],
    }
    (out / "lora_plus.json").write_text(json.dumps(found, indent=1, default=str))
    curves = {f"{m}, A at {one.rate:g}": one.history for m, one in best.items()}
    plot_losses(curves, out / "lora_plus.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="model folder, hub name or alias")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=rates, default=[1e-4, 4e-4, 1.6e-3], help="LoRA's")
    parser.add_argument("--plus-rates", type=rates, help="LoRA+'s for A (default: LoRA's over 4)")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=12, help="examples")
    parser.add_argument("--eval-every", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.plus_rates = args.plus_rates or [rate / 4 for rate in args.rates]
    args.out.mkdir(parents=True, exist_ok=True)
    base = resolve_model(args.base)
    # One pass over the data: what is learned is the task, not the examples.
    data = write_data(args.out, args.steps * args.batch_size, args.held_out, args.seed)
    runs = []
    for method, every in (("LoRA", args.rates), ("LoRA+", args.plus_rates)):
        for rate in every:
            runs.append(run(base, data, args.out, method, rate, args))
    shutil.rmtree(args.out / "adapter", ignore_errors=True)
    report(runs, args, args.out)


if __name__ == "__main__":
    main()
