"""A tiny model that follows a script: its weights are written, not trained.

Each script is a text in pieces, each of which is a token of its own, and stands in the script once.
The output layer knows which piece follows which. A piece may stand in several scripts; which of
them is written is told by the last token of the prompt, to which all heads attend. The chat
template chooses it by what the conversation has come to: the result is spoken of only behind a turn
which has asked for it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

HIDDEN, HEAD, END = 256, 32, "<|im_end|>"

FORECAST = "It is sunny in Rome."


def _words(text: str) -> list[str]:
    """A text in pieces, from word to word."""
    return re.findall(r"\S+\s*|\s+", text)


def _call(name: str, **arguments: str) -> list[str]:
    """A call in pieces. Names and keys, with the quote behind them, are pieces of their own: where
    a grammar allows one text only, it asks for that text's own tokens."""
    pieces = ["<tool_call>", "\n", '{"name": "', f'{name}"', ', "arguments": {']
    for number, (key, value) in enumerate(arguments.items()):
        pieces[-1] += '"' if number == 0 else ', "'
        first, *rest = _words(f'{value}"')
        pieces += [f'{key}"', f': "{first}', *rest]
    pieces[-1] += "}}\n"
    return [*pieces, "</tool_call>"]


# What is answered, by the state that the chat template finds.
SCRIPTS = {
    "ask": ["<think>", *_words("I must look it up.\n"), "</think>", *_call("weather", city="Rome")],
    "hand": _call("transfer_to_forecaster"),
    "tell": _words(FORECAST),
    "finish": _call("final_answer", answer=FORECAST),
    "report": _call("final_result", city="Rome", sky="sunny"),
    "code": _words('Thought: I ask.\n<code>\nprint(weather("Rome"))\n</code>'),
    "done": _words(f'Thought: I know.\n<code>\nfinal_answer("{FORECAST}")\n</code>'),
    "lost": _words("Nobody told me."),
}

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% set names = (tools or []) | map(attribute='function') | map(attribute='name') | list %}"
    # A template does not see what users and tools say, but who spoke, and which tool was called.
    "{% set turns = messages | selectattr('role', 'equalto', 'assistant') | list %}"
    "{% set last = turns[-1].tool_calls[0].function.name if turns and turns[-1].tool_calls"
    " else '' %}"
    "{% set told = turns and 'transfer' not in last %}"
    "{% set codes = not names and messages[0].role == 'system' %}"
    "<|im_start|>assistant\n"
    "{% if told %}"
    "{{ '<|finish|>' if 'final_answer' in names else '<|report|>' if 'final_result' in names"
    " else '<|done|>' if codes else '<|tell|>' }}"
    "{% elif 'weather' in names %}<|ask|>"
    "{% elif 'transfer_to_forecaster' in names %}<|hand|>"
    "{% else %}{{ '<|code|>' if codes else '<|lost|>' }}{% endif %}"
    "{# the model may begin with <think> and end it with </think> #}"
)


def write_scripted_model(folder: Path, tokenizer: Tokenizer, *, max_length: int) -> None:
    """Write the weights to a folder that has a tokenizer, to which the pieces are added."""
    states = {name: f"<|{name}|>" for name in SCRIPTS}
    pieces = list(dict.fromkeys(piece for script in SCRIPTS.values() for piece in script))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in states.values()])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in pieces])
    tokenizer.save(str(folder / "tokenizer.json"))

    known = [*states.values(), *pieces]
    assert len(known) + len(SCRIPTS) < HIDDEN - 1
    identity = {text: number for number, text in enumerate(known)}
    script_of = {name: len(known) + number for number, name in enumerate(SCRIPTS)}
    is_state = HIDDEN - 1
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=1,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config)
    (layer,) = model.model.layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        # What is no piece has no part in a script. An answer that has come to it soon ends.
        embedding[:, HIDDEN - 2] = 1.0
        output[tokenizer.token_to_id(END), HIDDEN - 2] = 4.0
        for text, number in identity.items():
            row = embedding[tokenizer.token_to_id(text)]
            row.zero_()
            row[number] = 1.0
        # A state's key is found by every query: in the dimensions that hardly rotate.
        slow = HEAD // 2 - 1
        layer.self_attn.q_proj.bias[slow::HEAD] = 32.0
        layer.self_attn.k_proj.weight[slow, is_state] = 1.0
        for number, (name, dimension) in enumerate(script_of.items()):
            row = embedding[tokenizer.token_to_id(states[name])]
            row[dimension] = row[is_state] = 1.0
            layer.self_attn.v_proj.weight[number, dimension] = 0.25
            layer.self_attn.o_proj.weight[dimension, number] = 0.5
        for name, script in SCRIPTS.items():
            assert len(set(script)) == len(script), "a piece may stand in a script once"
            row_of = [tokenizer.token_to_id(text) for text in (*script, END)]
            for before, row in zip((states[name], *script), row_of, strict=True):
                output[row, identity[before]] = 4.0
            for row in row_of:
                output[row, script_of[name]] = 4.0
    model.to(torch.bfloat16).save_pretrained(folder)
