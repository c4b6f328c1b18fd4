"""What is trained on is what serving has: its prompts' tokens, and answers that go on from them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from nybble.engine.conversation import ChatEncoder, in_parts, turn_of
from nybble.finetune.data import IGNORED, DataError, Example, read_examples
from nybble.loaders.templates import TemplateRenderer
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.prompts import Prompts

from ..tokenizer_kinds import TOKENIZERS

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATION
)
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    ),
    "no border": (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "space at the border": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    # As Qwen3's: of answers before the last question the thoughts are left out.
    "forgets thoughts": (
        "{% set last = messages | map(attribute='role') | list %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + GENERATION
    ),
    "parts": CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"),
}
TEXT = st.lists(
    st.sampled_from(
        ["the", " fox", "th", "e ", " ", "\n", "\n\n", "a", "<b>", "<|im_end|>", "<tool_call>", "ü"]
    ),
    min_size=1,
    max_size=5,
).map("".join)
WORDS = TEXT.filter(str.strip)


def read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str, messages: Any, **more: Any
) -> list[Example]:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": messages, **more}))
    tokenizer.chat_template = template
    return read_examples(path, tokenizer, max_length=10**6)


def turns_learned(example: Example) -> list[tuple[list[int], list[int]]]:
    """Each learned answer of an example, after all that comes before it."""
    found, at = [], 0
    while at < len(example.ids):
        start = at
        while start < len(example.ids) and example.labels[start] == IGNORED:
            start += 1
        end = start
        while end < len(example.ids) and example.labels[end] != IGNORED:
            end += 1
        if end > start:
            found.append((example.ids[:start], example.ids[start:end]))
        at = end
    return found


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(WORDS, min_size=2, max_size=6), thinks=st.booleans())
def test_every_answer_follows_the_prompt_that_serving_has(
    tmp_path: Path, name: str, template: str, texts: list[str], thinks: bool
) -> None:
    tokenizer, source = TOKENIZERS[name], TEMPLATES[template]
    texts = texts[: len(texts) // 2 * 2]
    thought = "<think>a fox</think>" if thinks else ""
    messages = [
        {"role": "user", "content": text}
        if index % 2 == 0
        else {"role": "assistant", "content": thought + text}
        for index, text in enumerate(texts)
    ]
    examples = read(tmp_path, tokenizer, source, messages)
    learned = [turn for example in examples for turn in turns_learned(example)]
    assert len(learned) == len(texts) // 2

    encoder = ChatEncoder(tokenizer)
    turns = encoder.shielded([turn_of(message) for message in messages], source)
    if template == "parts":
        turns = in_parts(turns)

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    for index, (prompt, answer) in enumerate(learned):
        shown = turns[: 2 * index + 1]
        rendered = tokenizer.apply_chat_template(
            shown, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(rendered, str)
        assert prompt == encoder.encode(rendered)
        # Some tokenizers put a space before a text, and behind each added token.
        said = text_of(prompt + answer)[len(text_of(prompt)) :].replace(" ", "")
        assert said.startswith(messages[2 * index + 1]["content"].replace(" ", ""))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_after_a_space_begins_with_its_letters(tmp_path: Path, name: str) -> None:
    """The prompt's last token is the space, which serving cannot take back."""
    tokenizer = TOKENIZERS[name]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the fox"}]
    (example,) = read(tmp_path, tokenizer, TEMPLATES["space at the border"], messages)
    ((prompt, answer),) = turns_learned(example)
    assert tokenizer.decode(prompt).endswith("assistant: ")
    assert tokenizer.decode(example.ids).endswith("assistant: the fox;")
    assert tokenizer.convert_ids_to_tokens(answer)[0] == "the"


@pytest.mark.parametrize("name", ["llama 2", "mistral"])
def test_an_answer_in_llamas_template_begins_with_its_word_and_no_space_alone(
    tmp_path: Path, name: str
) -> None:
    tokenizer = TOKENIZERS[name]
    messages = [
        {"role": "user", "content": "a fox"},
        {"role": "assistant", "content": "the dog"},
    ]
    (example,) = read(tmp_path, tokenizer, TEMPLATES["llama 2"], messages)
    ((_, answer),) = turns_learned(example)
    assert tokenizer.convert_ids_to_tokens(answer)[0] == "▁the"


def test_where_earlier_thoughts_are_forgotten_each_answer_is_an_example(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "<think>so</think>four"},
    ]
    first, second = read(tmp_path, tokenizer, TEMPLATES["forgets thoughts"], messages)
    assert tokenizer.decode(first.ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>hm</think>two<|im_end|>\n"
    )
    assert tokenizer.decode(second.ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\n<think>so</think>four<|im_end|>\n"
    )
    learned = [label for label in second.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "<think>so</think>four<|im_end|>\n"


def test_a_template_that_shows_no_text_is_refused(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    silent = CHATML.replace("{{ m.content }}", "")
    with pytest.raises(
        DataError, match=r"the text of message 0 \(of role user\) is not in the prom"
    ):
        read(tmp_path, tokenizer, silent, messages)
    only_users = CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}ho hi{% endif %}")
    with pytest.raises(DataError, match="the chat template leaves out the text of message 1"):
        read(tmp_path, tokenizer, only_users, messages)


def test_a_prompt_that_begins_with_bos_gets_no_second(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    tokenizer.bos_token = "<|im_start|>"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "<|im_start|>the", "completion": " fox"}))
    (example,) = read_examples(path, tokenizer, max_length=100)
    assert example.ids == tokenizer.encode(
        "<|im_start|>the fox<|im_end|>", add_special_tokens=False
    )


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[PreTrainedTokenizerBase], Prompts]]:
    """What makes a server's prompts by some tokenizer."""
    renderer = TemplateRenderer()
    yield lambda tokenizer: Prompts(tokenizer, "tiny", 10**4, renderer)
    renderer.close()


TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"properties": {}, "type": "object"}},
    }
]
LOOK = {
    "id": "call_abc123xyz",
    "type": "function",
    "function": {"name": "look", "arguments": '{"item": "fox"}'},
}
WITH_CALLS = [
    {"role": "user", "content": "where is the fox"},
    {"role": "assistant", "content": None, "tool_calls": [LOOK]},
    {"role": "tool", "tool_call_id": "call_abc123xyz", "content": "over the dog"},
    {"role": "assistant", "content": "the fox is over the dog"},
]
CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}CALL{% endfor %}"
)
# Each with what of the tools and calls its prompts have.
CALLING = {
    "phi 4 mini": (
        CHATML.replace(
            "{{ m.content }}",
            "{{ m.content }}{% if m.role == 'system' and 'tools' in m %}"
            "{{ '<|tool|>' + m.tools + '<|/tool|>' }}{% endif %}"
            "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
        ),
        '<|im_start|>system\n<|tool|>[{"name": "look", "parameters": {"properties"',
    ),
    "deepseek": (
        CALLS.replace("CALL", "{{ c.function.name + '\n' + c.function.arguments }}"),
        'look\n{"item": "fox"}<|im_end|>',
    ),
    "mistral": (
        CALLS.replace(
            "CALL",
            "{% if c.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
            "[TOOL_CALLS]{{ c.function.name }}{{ c.id }}",
        ),
        "[TOOL_CALLS]lookabc123xyz<|im_end|>",
    ),
    # Reads tools as most do, and has a word of Phi's.
    "of its own": (
        "{% if tools %}<|tool|>{{ tools | tojson }}{% endif %}"
        + CALLS.replace("CALL", "{{ c | tojson }}"),
        '<|tool|>[{"type": "function", "function": {"name": "look", ',
    ),
}


@pytest.mark.parametrize("name", CALLING)
def test_tools_and_calls_are_read_as_the_server_reads_them(
    tmp_path: Path, name: str, served: Callable[[PreTrainedTokenizerBase], Prompts]
) -> None:
    tokenizer, (template, shown) = TOKENIZERS["byte-level"], CALLING[name]
    # Files have fields in any order, which some templates write.
    messages, tools = json.loads(json.dumps([WITH_CALLS, TOOLS], sort_keys=True))
    (example,) = read(tmp_path, tokenizer, template, messages, tools=tools)
    assert shown in str(tokenizer.decode(example.ids))

    learned, prompts = turns_learned(example), served(tokenizer)
    assert len(learned) == 2
    for index, (prompt, _) in zip((1, 3), learned, strict=True):
        body = ChatRequest.model_validate(
            {"model": "tiny", "messages": WITH_CALLS[:index], "tools": TOOLS}
        )
        found = asyncio.run(prompts.chat(body.messages, body, tools=TOOLS))
        assert prompt == list(found.token_ids)


@pytest.mark.parametrize("around", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>", "$A <b>"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_has_around_it_what_the_server_puts_there_and_a_text_ends_once(
    tmp_path: Path, name: str, around: str, served: Callable[[PreTrainedTokenizerBase], Prompts]
) -> None:
    tokenizer = deepcopy(TOKENIZERS[name])
    tokenizer.bos_token = "<|im_start|>"
    pieces = ["<|im_start|>", "<|im_end|>", "<b>"]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=[*zip(pieces, ids, strict=True)]
    )
    path, prompts = tmp_path / "data.jsonl", served(tokenizer)
    for text in ("the quick", "<|im_start|>the", ""):
        rows = ({"prompt": text, "completion": " fox"}, {"text": text + " fox"})
        path.write_text("\n".join(map(json.dumps, rows)))
        answered, whole = read_examples(path, tokenizer, max_length=100)

        ((prompt, _),) = turns_learned(answered)
        assert prompt == list(asyncio.run(prompts.encode_all([text]))[0])
        bare = tokenizer.encode(text + " fox", add_special_tokens=False)
        begins = around.startswith("<|im_start|>") and not text.startswith("<|im_start|>")
        assert whole.ids == [*ids[:begins], *bare, tokenizer.eos_token_id]
