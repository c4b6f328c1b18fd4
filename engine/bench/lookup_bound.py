"""How many tokens a step prompt lookup makes of a model's answers, and how many any lookup could.

    python engine/bench/lookup_bound.py MODEL [--tokens 160] [--draft 8]

The model answers the prompts of ``speculation.py`` without drafts. Then drafting is played through
on the answers, which needs no clock: its outcome is exact and says what a model's texts allow. The
bound is an oracle's. Wherever the next tokens stood before in the prompt or in the answer, at least
two (or four) of them in a row, it drafts just these, and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from nybble import LLM, SamplingParams
from nybble.engine.bench.speculation import prompts
from nybble.engine.ngram_drafter import Ngrams

# The rows of each step, from a prompt and its answer.
Steps = Callable[[Sequence[int], Sequence[int]], list[int]]


def looked_up(limit: int) -> Steps:
    """As the engine drafts by prompt lookup."""

    def rows(prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        ngrams, place, found = Ngrams(), 1, list[int]()
        ngrams.extend([*prompt, answer[0]])
        while place < len(answer):
            match = ngrams.find(limit)
            draft = () if match is None else match.tokens
            right = 0
            for token, said in zip(draft, answer[place:], strict=False):
                if token != said:
                    break
                right += 1
            ngrams.extend(answer[place : place + right + 1])
            place += right + 1
            found.append(1 + len(draft))
        return found

    return rows


def oracle(least: int, limit: int) -> Steps:
    """As what drafts those tokens alone that are right, in runs of so many and more."""

    def rows(prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        tokens, place, found = [*prompt, *answer], len(prompt) + 1, list[int]()
        while place < len(tokens):
            best = 0
            for start in range(place - 1):
                right = 0
                while right < min(limit, len(tokens) - place, place - start) and (
                    tokens[start + right] == tokens[place + right]
                ):
                    right += 1
                best = max(best, right)
            drafted = best if best >= least else 0
            place += drafted + 1
            found.append(1 + drafted)
        return found

    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--draft", type=int, default=8, help="most tokens of a draft")
    args = parser.parse_args()
    ways = {
        "prompt lookup": looked_up(args.draft),
        "oracle, runs of two": oracle(2, args.draft),
        "oracle, runs of four": oracle(4, args.draft),
    }
    with LLM(args.model, kv_cache_bytes=256 << 20, progress=False) as model:
        for kind, asked in prompts().items():
            params = SamplingParams(
                max_tokens=args.tokens,
                temperature=1 if kind == "tell a story" else 0,
                seed=1,
            )
            conversations = [[{"role": "user", "content": text}] for text in asked]
            answers = model.chat(conversations, params)
            print(kind)
            for name, way in ways.items():
                steps = [way(each.prompt_token_ids, each.token_ids) for each in answers]
                count = sum(map(len, steps))
                tokens = sum(len(each.token_ids) - 1 for each in answers)
                rows = sum(map(sum, steps)) / count
                print(f"  {name}: {tokens / count:.2f} tokens a step, {rows:.2f} rows", flush=True)


if __name__ == "__main__":
    main()
