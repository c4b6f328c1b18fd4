"""Many LoRA adapters on one base model: each prompt has its own adapter, and all run in one batch.

    python examples/adapters.py MODEL ADAPTER...

An adapter is a folder that PEFT has written, or a hub name.
"""

import sys

from nybble import LLM, SamplingParams


def main(model: str, *adapters: str) -> None:
    prompt = "The weather today is"
    with LLM(model, enable_lora=True, max_loras=8, max_lora_rank=64) as llm:
        chosen = [None, *adapters]  # None is the base model
        done = llm.generate(
            [prompt] * len(chosen), SamplingParams(max_tokens=24, temperature=0), adapter=chosen
        )
        for adapter, completion in zip(chosen, done, strict=True):
            print(f"{adapter or 'base model'}: {prompt}{completion.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
