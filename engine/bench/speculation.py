"""Tokens a second with drafts and without, on texts that repeat and that do not.

    python engine/bench/speculation.py MODEL [--draft-model MODEL] [--rounds 4] [--streams 1 8]

The ways take turns within each round, so that whatever else the machine does meets all of them. The
outputs are compared: they must be the same.

Beside the rates it says what a draft brought, and what it has to bring: a step that drafts and
verifies takes longer than one that does not, by as many tokens as would have been made in that time
without drafts. So many must be accepted of a draft on average: the break-even. Where more are, the
ratio is above 1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Literal

from nybble import LLM, SamplingParams


@dataclass
class Way:
    """One way to speculate, and what was measured of it.

    tokens, taken, steps, seconds: of all rounds; taken are seconds from the requests to the last
        answer, and seconds are those of the steps.
    drafts, drafted, accepted: drafts that were verified, their tokens, and how many were accepted.
    """

    model: LLM
    tokens: int = 0
    taken: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    def time(
        self, conversations: list[list[dict[str, str]]], params: SamplingParams
    ) -> tuple[tuple[int, ...], ...]:
        """Answer conversations; returns the answers' tokens."""
        # So that the prompts are cached, and decoding alone is timed.
        self.model.chat(conversations, SamplingParams(max_tokens=1))
        before, started = self.model._engine.stats(), time.perf_counter()
        answers = self.model.chat(conversations, params)
        taken, after = time.perf_counter() - started, self.model._engine.stats()
        tokens = sum(len(answer.token_ids) for answer in answers)
        self.tokens += tokens
        self.taken += taken
        self.steps += after.steps - before.steps
        self.seconds += after.step_seconds - before.step_seconds
        self.drafts += sum(after.accepted_of_draft.counts) - sum(before.accepted_of_draft.counts)
        self.drafted += after.draft_tokens - before.draft_tokens
        self.accepted += after.accepted_tokens - before.accepted_tokens
        return tuple(answer.token_ids for answer in answers)

    def report(self, off: Way) -> str:
        """Tokens a second, their ratio to those without drafts, and what drafts brought."""
        rate = self.tokens / self.taken
        line = f"{rate:.1f} (× {rate * off.taken / off.tokens:.2f})"
        if not self.drafts:
            return line
        longer = (self.seconds / self.steps) / (off.seconds / off.steps)
        needed = (longer - 1) * off.tokens / off.steps * self.steps  # tokens to be accepted
        return (
            f"{line}; {self.drafted / self.drafts:.1f} tokens a draft, "
            f"{self.accepted / self.drafted:.0%} of them accepted, break-even at "
            f"{needed / self.drafted:.0%}"
        )


_REPORTS = (
    """The harbour bridge was closed on Monday after a diver found a crack in its second pier. "The
    crack is as long as my arm," said Ana Ruiz, who leads the inspection. The city wants to reopen
    one lane before the end of the month. Lorries must use the northern ferry until then. "We lose
    two hours on every trip," said Tom Berg, who drives timber to the mill. The repair will cost
    about three million, of which the state pays half. A second inspection begins on Thursday, and
    its report will be public.""",
    """The library in Elm Street opens its new reading room on Saturday. The room has sixty seats,
    and half of them look out on the garden. "People asked for quiet and for light," said the
    librarian, Joan Mills. Laptops are allowed upstairs only. The café in the hall will close at
    five, one hour earlier than before. Books that were kept in the cellar since the flood are back
    on the shelves. "I have waited four years for the atlas of 1890," said a visitor.""",
    """The co-operative bakery ended its first year with a small profit. It sold nine thousand
    loaves, most of them rye. "We learned to bake less on Tuesdays," said Omar Haddad, one of the
    six founders. The oven broke twice, and each repair took a week. Members voted to buy a second
    oven in spring. Flour comes from two mills in the valley. A loaf will cost ten cents more from
    January on. "Nobody likes it, but wheat has become dear," the treasurer wrote.""",
    """The night train to the coast returns after eleven years. It leaves the capital at ten in the
    evening and arrives before breakfast. "We sold the first thousand tickets in a day," said the
    manager of the line, Eva Novak. Each train has four sleeping cars and one for bicycles. Farmers
    along the line worry about noise. The minister promised a wall near the villages. Tickets cost
    as much as the bus, and children travel free until June.""",
)


def prompts() -> dict[str, list[str]]:
    """By kind of text: what is asked. Stories and chats do not repeat the prompt; the others do.

    Explanations repeat half of what they say. Stories are told at a temperature of 1: the likeliest
    tokens alone soon go round in circles.
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
        "summarise with quotes": [
            f"{' '.join(report.split())}\n\nWhat does the report above say? List its main points, "
            "each as a direct quote of the whole sentence."
            for report in _REPORTS
        ],
        "quote and explain": [
            "Here is a documentation:\n"
            + str(inspect.getdoc(function))
            + "\nExplain it sentence by sentence: quote each sentence, then say it in other words."
            for function in (json.dump, random.sample, statistics.quantiles, inspect.signature)
        ],
        "chat": [
            "What is the difference between a list and a tuple in Python?",
            "Write an email to my landlord about a broken window.",
            "Give me a plan for learning Spanish in six months.",
            "What should I see in Lisbon in three days?",
        ],
        "tell a story": [
            f"Tell a long story about {subject}, in which no sentence resembles another."
            for subject in ("a lighthouse", "two clockmakers", "a lost map", "the first snow")
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--draft-model")
    parser.add_argument("--mtp", action="store_true", help="draft with the checkpoint's own head")
    parser.add_argument("--quantize", choices=["nf4"])
    parser.add_argument("--draft-quantize", choices=["nf4"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--draft", type=int, default=8, help="most tokens of a draft")
    parser.add_argument("--kinds", nargs="+", choices=prompts(), default=list(prompts()))
    args = parser.parse_args()

    def load(way: Literal["off", "ngram", "draft", "mtp", "auto"]) -> LLM:
        drafts = way in ("draft", "auto")
        return LLM(
            args.model,
            quantize=args.quantize,
            speculate=way,
            draft_model=args.draft_model if drafts else None,
            draft_quantize=args.draft_quantize if drafts else None,
            max_draft_tokens=args.draft,
            kv_cache_bytes=256 << 20,
            progress=False,
        )

    always: Literal["ngram", "draft", "mtp"] = "ngram" if args.draft_model is None else "draft"
    if args.mtp:
        always = "mtp"
    models = {way: load(way) for way in ("off", always, "auto")}
    for streams in args.streams:
        print(f"{streams} streams: tokens a second, and ratios to no drafts")
        for kind, asked in prompts().items():
            if kind not in args.kinds:
                continue
            ways = {name: Way(model) for name, model in models.items()}
            params = SamplingParams(
                max_tokens=args.tokens,
                temperature=1 if kind == "tell a story" else 0,
                seed=1,
                ignore_eos=streams > 1,  # so that all streams last
            )
            for turn in range(args.rounds):
                texts = set()
                batch = [asked[(turn + n) % len(asked)] for n in range(streams)]
                conversations = [[{"role": "user", "content": text}] for text in batch]
                for way in ways.values():
                    texts.add(way.time(conversations, params))
                assert len(texts) == 1, "drafts changed the output"
            print(f"  {kind}")
            for name, way in ways.items():
                print(f"    {name}: {way.report(ways['off'])}", flush=True)
    for model in models.values():
        model.close()


if __name__ == "__main__":
    main()
