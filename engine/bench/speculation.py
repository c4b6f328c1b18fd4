"""Tokens a second with drafts by prompt lookup and without, on texts that repeat and that do not.

    python engine/bench/speculation.py MODEL [--rounds 3] [--streams 1 8]

The ways take turns within each round, so that whatever else the machine does meets all of them. The
outputs are compared: they must be the same.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import time
from typing import Literal

from nybble import LLM, SamplingParams

WAYS: tuple[Literal["off", "ngram", "auto"], ...] = ("off", "ngram", "auto")


def prompts() -> dict[str, list[str]]:
    """By kind of text: what is asked. Code, records and quotes repeat the prompt; stories do not.

    Stories are told at a temperature of 1: the likeliest tokens alone soon go round in circles.
    """
    sources = [
        inspect.getsource(function)
        for function in (json.dump, random.shuffle, random.sample, statistics.quantiles)
    ]
    people = [
        {"name": f"Person {n}", "city": city, "age": 20 + 7 * n, "tags": ["new", "paid"][: n % 3]}
        for n, city in enumerate(("Oslo", "Lima", "Accra", "Hanoi", "Quito", "Tunis"))
    ]
    return {
        "rewrite code": [
            f"Rewrite this function. Rename its first parameter to `value` and change nothing "
            f"else. Answer with the code alone.\n```python\n{source}```"
            for source in sources
        ],
        "extract JSON": [
            f"Here are records:\n{json.dumps(people[shift:] + people[:shift], indent=2)}\nRepeat "
            "them as a JSON array, with the field `city` renamed to `town`."
            for shift in range(4)
        ],
        "quote": [
            "Here is a documentation:\n"
            + str(inspect.getdoc(function))
            + "\nExplain it sentence by sentence: quote each sentence, then say it in other words."
            for function in (json.dump, random.sample, statistics.quantiles, inspect.signature)
        ],
        "tell a story": [
            f"Tell a long story about {subject}, in which no sentence resembles another."
            for subject in ("a lighthouse", "two clockmakers", "a lost map", "the first snow")
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--draft", type=int, default=8)
    args = parser.parse_args()
    models = {
        way: LLM(
            args.model,
            speculate=way,
            max_draft_tokens=args.draft,
            kv_cache_bytes=256 << 20,
            progress=False,
        )
        for way in WAYS
    }
    for streams in args.streams:
        print(f"{streams} streams: tokens a second, and ratios to no drafts")
        for kind, asked in prompts().items():
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            params = SamplingParams(
                max_tokens=args.tokens,
                temperature=1 if kind == "tell a story" else 0,
                seed=1,
                ignore_eos=True,
            )
            for turn in range(args.rounds):
                texts = set()
                batch = [asked[(turn + n) % len(asked)] for n in range(streams)]
                for way, model in models.items():
                    conversations = [[{"role": "user", "content": text}] for text in batch]
                    # So that the prompts are cached, and decoding alone is timed.
                    model.chat(conversations, SamplingParams(max_tokens=1))
                    started = time.perf_counter()
                    answers = model.chat(conversations, params)
                    taken = time.perf_counter() - started
                    rates[way].append(sum(len(a.token_ids) for a in answers) / taken)
                    texts.add(tuple(answer.token_ids for answer in answers))
                assert len(texts) == 1, "drafts changed the output"
            medians = {way: statistics.median(each) for way, each in rates.items()}
            ratios = ", ".join(
                f"{way} {medians[way]:.1f} (× {medians[way] / medians['off']:.2f})" for way in WAYS
            )
            print(f"  {kind}: {ratios}", flush=True)
    for model in models.values():
        model.close()


if __name__ == "__main__":
    main()
