"""How long a running stream pauses while an adapter with a tokenizer of its own is loaded.

    python -m nybble.engine.bench.adapter_load_pause --tokens 151000

A tiny model with a large vocabulary, so that a step takes a millisecond and what is measured is the
pause: the longest time between two tokens of a stream, without and with an adapter being loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nybble.engine import (
    AdapterConfig,
    Engine,
    EngineConfig,
    GrammarCompiler,
    Request,
    SamplingParams,
    Tokens,
)
from nybble.loaders import open_checkpoint

_HIDDEN = 64


def _tokenizer(tokens: int) -> Tokenizer:
    """Byte-level BPE of so many tokens, as large as those of models: with as many merges."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = []
    grown = letters
    while len(vocabulary) < tokens:
        shorter, grown = grown, []
        for left in shorter:
            for right in letters[: 1 + (tokens - len(vocabulary)) // max(1, len(shorter))]:
                if left + right not in vocabulary and len(vocabulary) < tokens:
                    vocabulary[left + right] = len(vocabulary)
                    merges.append((left, right))
                    grown.append(left + right)
    found = Tokenizer(BPE(vocabulary, merges))
    found.pre_tokenizer = ByteLevel(add_prefix_space=False)
    found.decoder = ByteLevelDecoder()
    found.add_special_tokens(["<s>", "</s>"])
    return found


def _write_model(folder: Path, tokens: int) -> None:
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=tokens + 64,  # room for an adapter's tokens
        hidden_size=_HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokens + 1,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_tokenizer(tokens), eos_token="</s>"
    )
    fast.save_pretrained(folder)


def _write_adapter(folder: Path, base: Tokenizer, number: int) -> None:
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(layer, part): torch.randn(4, _HIDDEN) if part == "A" else torch.ones(_HIDDEN, 4)
        for layer in range(2)
        for part in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    own = Tokenizer.from_str(base.to_str())
    own.add_tokens([AddedToken(f"<own-{number}>", special=True)])
    own.save(str(folder / "tokenizer.json"))


async def _longest(engine: Engine, number: int, seconds: float, adapter: Path | None) -> float:
    """The longest pause of a stream in seconds; an adapter is loaded after a second of it."""
    loading: asyncio.Task[object] | None = None
    longest, begun = 0.0, time.monotonic()
    previous = begun
    params = SamplingParams(temperature=0, ignore_eos=True)
    while time.monotonic() < begun + seconds or (loading is not None and not loading.done()):
        request = Request(f"{number}-{previous}", (5, 6, 7), params)
        async for _ in engine.generate(request):
            now = time.monotonic()
            longest, previous = max(longest, now - previous), now
            if adapter is not None and loading is None and now > begun + 1:
                load = asyncio.to_thread(engine.load_adapter, adapter.name, str(adapter))
                loading = asyncio.create_task(load)
            if now > begun + seconds and (loading is None or loading.done()):
                break
    if loading is not None:
        await loading
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=151_000)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        _write_model(model, asked.tokens)
        config = EngineConfig(kv_cache_bytes=64 << 20, adapters=AdapterConfig(slots=2, max_rank=8))
        engine = Engine.load(open_checkpoint(model), config, progress=False)
        tokens = engine.tokens
        base = GrammarCompiler(tokens.tokenizer, tokens.rows, tokens.ends)
        base.read_vocabulary()

        def prepare(own: Tokens) -> None:  # as a server does
            GrammarCompiler(own.tokenizer, own.rows, own.ends, base=base).read_vocabulary()

        engine.before_serving_tokens(prepare)
        engine.start()
        try:
            for number in range(asked.times):
                adapter = Path(temporary) / f"adapter-{number}"
                _write_adapter(adapter, tokens.tokenizer.backend_tokenizer, number)
                plain = asyncio.run(_longest(engine, 2 * number, 3, None))
                loading = asyncio.run(_longest(engine, 2 * number + 1, 3, adapter))
                own = engine.tokens_of(adapter.name).added
                result = {"longest_pause_ms": {"alone": plain * 1e3, "loading": loading * 1e3}}
                print(json.dumps(result | {"own_tokens": own}), flush=True)
        finally:
            engine.stop()


if __name__ == "__main__":
    main()
