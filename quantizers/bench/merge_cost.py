"""What merging an adapter into a 4-bit base keeps of it, every way of rounding in one run.

python quantizers/bench/merge_cost.py BASE ADAPTER [--tokens 4096] [--samples 16] [--text FILE]
    [--ways nearest calibrated "merged layers in 16 bits" "all in 16 bits"]

Prints the KL divergence from the base with the adapter unmerged, on Python's own sources unless a
text is given: of the base without it, and merged in each of the ways. Seconds are the merge's, of
the clock and of the processor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nybble.loaders import load_adapter, open_checkpoint, resolve_adapter, resolve_model
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import architecture_of
from nybble.quantizers import merge_adapter, merge_divergence
from nybble.quantizers.corpus import standard_library_text, token_windows
from nybble.quantizers.merge import MergedLayer

WAYS = ("nearest", "calibrated", "merged layers in 16 bits", "all in 16 bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    base = resolve_model(args.base)
    adapter = load_adapter(
        resolve_adapter(args.adapter), architecture_of(open_checkpoint(base).config)
    )
    tokenizer = load_tokenizer(base)
    held_out = standard_library_text("held-out") if args.text is None else args.text.read_text()
    text = token_windows(tokenizer, held_out, samples=args.tokens // 512, length=512).flatten()
    calibration = token_windows(
        tokenizer, standard_library_text("calibration"), samples=args.samples, length=512
    )
    merge = partial(merge_adapter, base, adapter, progress=False)
    ways: dict[str, Callable[[Path], list[MergedLayer]]] = {
        "nearest": merge,
        "calibrated": partial(merge, calibration=calibration),
        "merged layers in 16 bits": partial(merge, keep_16_bits=True),
        "all in 16 bits": partial(merge, format="bf16"),
    }
    dropped = merge_divergence(base, adapter, base, text)
    print(f"{'without':>24s}  KL {dropped:.5f} nats a token", flush=True)
    for name in args.ways:
        with tempfile.TemporaryDirectory() as scratch:
            begin, busy = time.monotonic(), time.process_time()
            layers = ways[name](Path(scratch) / "merged")
            seconds, busy = time.monotonic() - begin, time.process_time() - busy
            found = merge_divergence(base, adapter, Path(scratch) / "merged", text)
        mean = sum(layer.relative_to_change for layer in layers) / len(layers)
        print(
            f"{name:>24s}  KL {found:.5f}, {found / dropped:5.1%} of that; "
            f"error {mean:.2f} × the change; {seconds:.0f} s, {busy:.0f} s busy",
            flush=True,
        )


if __name__ == "__main__":
    main()
