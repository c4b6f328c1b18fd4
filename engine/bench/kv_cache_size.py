"""Bytes that a sequence keeps in the KV cache, with groups of layers and without.

    python engine/bench/kv_cache_size.py FOLDER_OR_CONFIG [...] [--tokens 32768]

A folder has a config.json; its weights are not needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from transformers import AutoConfig

from nybble.engine.config import EngineConfig
from nybble.engine.kv_cache import KVCacheGroup, KVCacheLayout
from nybble.models import architecture_of


def report(folder: str, tokens: int) -> str:
    """One row of a table: groups, MiB while reading the prompt, while decoding, and without."""
    architecture, config = architecture_of(AutoConfig.from_pretrained(folder)), EngineConfig()
    layout = KVCacheLayout.of(architecture, config, tokens)
    kinds = ", ".join(f"{len(group.layers)} × {group.window or 'all'}" for group in layout.groups)
    everything = KVCacheGroup(0, tuple(range(len(architecture.layers))))
    one_group = replace(
        layout,
        groups=(everything,),
        block_bytes=layout.block_bytes
        * len(everything.layers)
        // max(len(group.layers) for group in layout.groups),
    )
    without = one_group.sequence_bytes(tokens)
    reading = layout.sequence_bytes(tokens)
    decoding = replace(layout, step_tokens=1).sequence_bytes(tokens)
    return (
        f"| {folder} | {kinds} | {without >> 20:,} | {reading >> 20:,} ({reading / without:.1%}) | "
        f"{decoding >> 20:,} ({decoding / without:.1%}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=32_768)
    args = parser.parse_args()
    print("| model | groups: layers × window | MiB without | MiB, reading | MiB, decoding |")
    for folder in args.models:
        print(report(folder, args.tokens))


if __name__ == "__main__":
    main()
