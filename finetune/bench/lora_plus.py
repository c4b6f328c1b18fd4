"""LoRA+ against LoRA: the same base, data, seeds and steps, each at the best of several rates.

    python finetune/bench/lora_plus.py BASE OUT [--steps 60] [--rates 4e-4,1.6e-3] [--seeds 0,1] …

The task is formal and nothing models are trained on: from a Python statement to the bytecode it
compiles to, on the standard library's own statements (PSF licence); whole modules are held out,
and no statement is in both parts. What is compared is how many steps each takes to the held-out
loss that LoRA has at its best rate, in the end and after half the steps. Rates are tried with the
first seed; the best of either method is run with the other seeds too. Writes OUT/lora_plus.json
and OUT/lora_plus.png; runs that OUT/runs has are not made again.

Hayou, Ghosh, Yu 2024 recommend B's rate at 16 times A's; here LoRA+'s rates for A are LoRA's over
4 by default, so that the geometric means of A's and B's rates are LoRA's rates.
"""

from __future__ import annotations

import argparse
import ast
import dis
import hashlib
import json
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from nybble.finetune import FinetuneSettings, LoRASettings, finetune, plot_losses
from nybble.finetune.train import Point
from nybble.loaders import resolve_model

_PACKAGES = ("", "asyncio", "collections", "email", "http", "importlib", "json", "urllib", "xml")
_STATEMENT = range(8, 48)  # characters
_INSTRUCTIONS = range(3, 9)
_METHODS = ("LoRA", "LoRA+")
_LEFT_OUT = ("RESUME", "CACHE", "PRECALL", "PUSH_NULL")  # of the interpreter, not of the statement


@dataclass(frozen=True)
class Run:
    """rate: of A. history: held-out loss per token by step, and the training steps' own."""

    method: str
    rate: float
    ratio: float
    seed: int
    history: tuple[Point, ...]
    seconds: float

    @property
    def measured(self) -> list[tuple[int, float]]:
        return [(p.step, p.eval_loss) for p in self.history if p.eval_loss is not None]

    @property
    def best(self) -> float:
        return min(loss for _, loss in self.measured)

    def best_until(self, last: float) -> float:
        return min(loss for step, loss in self.measured if step <= last)

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


def compiled_statements(module: Path) -> list[tuple[str, str]]:
    """The module's short statements, each with its instructions as ``dis`` shows them."""
    found = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.Expr):
            continue
        statement = ast.unparse(node)
        if len(statement) not in _STATEMENT or "\n" in statement:
            continue
        try:
            code = compile(statement, "", "exec")
        except SyntaxError:  # such as await, outside of a function
            continue
        shown = [one for one in dis.get_instructions(code) if one.opname not in _LEFT_OUT]
        shown = shown[:-2] if shown[-1].opname == "RETURN_VALUE" else shown[:-1]
        # A lambda's code would be shown with its address.
        if len(shown) in _INSTRUCTIONS and not any("code object" in i.argrepr for i in shown):
            lines = (f"{one.opname} {one.argrepr}".rstrip() for one in shown)
            found.append((statement, "\n".join(lines)))
    return found


def write_data(folder: Path, train: int, held_out: int) -> tuple[Path, Path]:
    """Two files of so many examples. Raises ValueError if there are not enough."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for name in _PACKAGES for path in sorted((stdlib / name).glob("*.py"))]
    random.Random(0).shuffle(modules)
    parts: tuple[list[tuple[str, str]], ...] = ([], [])
    seen: set[str] = set()
    for index, module in enumerate(modules):
        for statement, code in compiled_statements(module):
            if statement not in seen:
                seen.add(statement)
                parts[index % 4 == 3].append((statement, code))
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part, count in zip(paths, parts, (train, held_out), strict=True):
        if len(part) < count:
            raise ValueError(f"the standard library has {len(part)} examples, not {count}")
        rows = [
            {"prompt": f"{statement}\n\n", "completion": code}
            for statement, code in random.Random(0).sample(part, count)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    return paths


def run(
    base: Path,
    data: tuple[Path, Path],
    out: Path,
    method: str,
    rate: float,
    seed: int,
    args: argparse.Namespace,
) -> Run:
    ratio = args.ratio if method == "LoRA+" else 1.0
    settings = FinetuneSettings(
        lora=LoRASettings(rank=args.rank, alpha=2 * args.rank),
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
        seed=seed,
    )
    content = repr((str(base), [path.read_text() for path in data], settings))
    saved = out / "runs" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not saved.exists():
        print(f"{method}, A's rate {rate:.1e}, seed {seed}", file=sys.stderr)
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
    return Run(method, rate, ratio, seed, history, found["seconds"])


def best_rate(runs: Sequence[Run], method: str, seed: int) -> float:
    tried = (one for one in runs if one.method == method and one.seed == seed)
    return min(tried, key=lambda one: one.best).rate


def report(runs: Sequence[Run], args: argparse.Namespace, out: Path) -> None:
    print(f"{'method':8} {'rate of A':>10} {'of B':>10} {'seed':>5} {'held-out loss':>14} {'s':>5}")
    for one in runs:
        print(
            f"{one.method:8} {one.rate:10.1e} {one.rate * one.ratio:10.1e} {one.seed:5} "
            f"{one.best:14.4f} {one.seconds:5.0f}"
        )
    rates = {method: best_rate(runs, method, args.seeds[0]) for method in _METHODS}
    compared = [one for one in runs if one.rate == rates[one.method]]
    steps: dict[str, dict[str, list[float | None]]] = {}
    for goal in ("LoRA's best", "LoRA's after half the steps"):
        steps[goal] = {method: [] for method in _METHODS}
        for seed in args.seeds:
            of_seed = {one.method: one for one in compared if one.seed == seed}
            loss = of_seed["LoRA"].best
            if goal != "LoRA's best":
                loss = of_seed["LoRA"].best_until(args.steps / 2)
            for method in _METHODS:
                steps[goal][method].append(of_seed[method].steps_to(loss))
        for method, counts in steps[goal].items():
            shown = ", ".join("never" if one is None else f"{one:.1f}" for one in counts)
            print(f"steps to {goal}, by seed: {method} at {rates[method]:.1e}: {shown}")
    for method in _METHODS:
        average = mean(one.best for one in compared if one.method == method)
        print(f"{method}: mean held-out loss {average:.4f}")
    found = {
        "base": str(args.base),
        "settings": {k: v for k, v in vars(args).items() if k not in ("base", "out")},
        "steps": steps,
        "runs": [
            {**asdict(one), "history": [asdict(p) for p in one.history], "best": one.best}
            for one in runs
        ],
    }
    (out / "lora_plus.json").write_text(json.dumps(found, indent=1, default=str))
    curves = {f"{one.method}, A at {one.rate:g}, seed {one.seed}": one.history for one in compared}
    plot_losses(curves, out / "lora_plus.png")


def numbers(of: type[float] | type[int]) -> Callable[[str], list[Any]]:
    return lambda text: [of(one) for one in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="model folder, hub name or alias")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=numbers(float), default=[4e-4, 1.6e-3], help="LoRA's")
    parser.add_argument("--plus-rates", type=numbers(float), help="of A (default: LoRA's over 4)")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=48, help="examples")
    parser.add_argument("--eval-every", type=int, default=6)
    parser.add_argument("--seeds", type=numbers(int), default=[0])
    args = parser.parse_args()
    args.plus_rates = args.plus_rates or [rate / 4 for rate in args.rates]
    args.out.mkdir(parents=True, exist_ok=True)
    base = resolve_model(args.base)
    # One pass over the data: what is learned is the task, not the examples.
    data = write_data(args.out, args.steps * args.batch_size, args.held_out)
    first, *others = args.seeds
    runs = []
    for method, every in zip(_METHODS, (args.rates, args.plus_rates), strict=True):
        runs += [run(base, data, args.out, method, rate, first, args) for rate in every]
    for seed in others:
        for method in _METHODS:
            rate = best_rate(runs, method, first)
            runs.append(run(base, data, args.out, method, rate, seed, args))
    shutil.rmtree(args.out / "adapter", ignore_errors=True)
    report(runs, args, args.out)


if __name__ == "__main__":
    main()
