"""A model in your own program: a batch of prompts, a conversation, and log probabilities.

python examples/offline.py [MODEL]
"""

import sys

from nybble import LLM, SamplingParams


def main(model: str = "demo") -> None:
    with LLM(model) as llm:
        # All prompts are computed in one batch; completions have the order of the prompts.
        prompts = ["def add(", "def subtract(", "class Stack:"]
        for prompt, done in zip(
            prompts, llm.generate(prompts, SamplingParams(max_tokens=32)), strict=True
        ):
            print(f"{prompt!r} → {done.text!r} ({done.finish_reason})")

        # A conversation, in the model's own chat template. Temperature 0 is greedy.
        messages = [
            {"role": "system", "content": "Answer in one line."},
            {"role": "user", "content": "How do I reverse a list in Python?"},
        ]
        (answer,) = llm.chat(messages, SamplingParams(max_tokens=64, temperature=0, logprobs=1))
        print("assistant:", answer.text)
        print("log probability:", sum(token.logprob for token in answer.logprobs))


if __name__ == "__main__":
    main(*sys.argv[1:])
