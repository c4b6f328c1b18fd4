"""gpt-oss' answers: analysis is reasoning, calls go to functions, and the rest is the answer.

The texts are those of OpenAI's description of the format.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nybble.engine import BudgetGuide, GrammarCompiler, Vocabulary
from nybble.server.api.answer_form import AnswerForm
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.output.dialect import Dialect
from nybble.server.api.output.events import Arguments, Call, Reasoning, Text
from nybble.server.api.output.harmony import MARKERS, HarmonyParser
from nybble.server.api.output.markers import MarkerTokens
from nybble.server.api.tools import Tools

PROMPT = "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>Simple. 2 < 4.<|end|><|start|>assistant"
CALL = (
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"location": "San Francisco"}'
)


def read(pieces: list[str], prompt: str = PROMPT, **options: Any) -> tuple[str, str, list[Any]]:
    """Reasoning, text and calls."""
    parser = HarmonyParser(prompt, **{"calls": True, **options})
    thought, text, calls = "", "", list[list[str]]()
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        if isinstance(event, Reasoning):
            thought += event.text
        elif isinstance(event, Text):
            text += event.text
        elif isinstance(event, Call):
            calls.append([event.name, ""])
        else:
            assert isinstance(event, Arguments)
            calls[event.index][1] += event.text
    return thought, text, calls


FOUND = [["weather", '{"location": "San Francisco"}']]
CASES = [
    (
        f"{ANALYSIS}<|channel|>final<|message|>2 + 2 = 4.<|return|>",
        "Simple. 2 < 4.",
        "2 + 2 = 4.",
        [],
    ),
    (f"{ANALYSIS}<|channel|>final<|message|>2 + 2 = 4.", "Simple. 2 < 4.", "2 + 2 = 4.", []),
    ("<|channel|>final<|message|>4", "", "4", []),
    ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}", []),
    (ANALYSIS + CALL, "Simple. 2 < 4.", "", FOUND),
    (f"{ANALYSIS}{CALL}<|call|>", "Simple. 2 < 4.", "", FOUND),
    # The address may stand before the channel.
    (
        ' to=functions.weather<|channel|>commentary json<|message|>{"location": "San Francisco"}',
        "",
        "",
        FOUND,
    ),
    # A preamble is for the user.
    (
        f"<|channel|>commentary<|message|>**Plan**: look.<|end|><|start|>assistant{CALL}",
        "",
        "**Plan**: look.",
        FOUND,
    ),
    ("<|channel|>analysis<|message|>It never ends <|e", "It never ends <|e", "", []),
    ("<|channel|>anal", "", "", []),
    ("<|channel|>commentary to=functions.now<|message|>", "", "", [["now", "{}"]]),
]


@pytest.mark.parametrize(("text", "thought", "answer", "calls"), CASES)
@given(data=st.data())
def test_messages_are_told_apart_however_the_text_is_cut(
    text: str, thought: str, answer: str, calls: list[Any], data: st.DataObject
) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(pieces) == (thought, answer, calls)


@given(
    text=st.lists(
        st.sampled_from((*MARKERS, "analysis", "final", "to=functions.f", " ", "\n", "{}", "a")),
        max_size=14,
    ).map("".join)
)
def test_no_text_is_too_strange_to_read(text: str) -> None:
    assert read(list(text)) == read([text])


def test_an_answer_that_the_prompt_has_begun_goes_on_in_its_channel() -> None:
    assert read(["4."], f"{PROMPT}<|channel|>final<|message|>2 + 2 = ") == ("", "4.", [])
    assert read(["4."], f"{PROMPT}<|channel|>analysis<|message|>2 + 2 = ") == ("4.", "", [])


def test_reasoning_may_stay_in_the_content() -> None:
    thought, text, _ = read([f"{ANALYSIS}<|channel|>final<|message|>4"], split=False)
    assert (thought, text) == ("", "Simple. 2 < 4.4")


def test_tokens_of_analysis_are_counted_with_their_header() -> None:
    parser = HarmonyParser(PROMPT, calls=False)
    pieces = ("<|channel|>", "analysis", "<|message|>", "Two", "<|end|>")  # 5 tokens
    for piece in (*pieces, "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "4"):
        parser.feed(piece, 1)
    assert parser.reasoning_tokens == 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["analysis analysis analysis final"], trainer)
    backend.add_special_tokens([AddedToken(each, special=True) for each in MARKERS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>")


def form_of(tokenizer: Any, **options: Any) -> tuple[AnswerForm, GrammarCompiler]:
    function = {"name": "weather", "parameters": {"properties": {"location": {"type": "string"}}}}
    body = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [{"type": "function", "function": function}],
            **options,
        }
    )
    tokens, dialect = MarkerTokens(tokenizer), Dialect(harmony=True)
    ends = frozenset(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))
    compiler = GrammarCompiler(tokenizer, len(tokenizer), ends)
    return AnswerForm(dialect, tokens, Tools(dialect, body, tokens), PROMPT), compiler


def says(guide: Any, tokenizer: Any, text: str) -> bool:
    walk = guide.fork()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not walk.allowed()[token]:
            return False
        if walk.accept(token):
            return True
    return bool(walk.allowed()[tokenizer.eos_token_id])


def test_a_guided_answer_comes_in_the_final_channel_behind_the_analysis(tokenizer: Any) -> None:
    form, compiler = form_of(tokenizer)
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    guide = compiler.after(form.lead(calls=False)).json_schema(schema)
    answer = '<|channel|>final<|message|>{"x": 1}'
    assert says(guide, tokenizer, ANALYSIS + answer)
    assert says(guide, tokenizer, answer)
    assert not says(guide, tokenizer, ANALYSIS + '<|channel|>final<|message|>{"x": "1"}')
    assert not says(guide, tokenizer, "<|channel|>analysis<|message|>Simple.")


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_are_held_to_their_schema(tokenizer: Any, choice: str) -> None:
    form, compiler = form_of(tokenizer, tool_choice=choice)
    assert form.tools is not None
    guide = form.tools.guide(compiler.after(form.lead(calls=True)), [])
    assert says(guide, tokenizer, ANALYSIS + CALL)
    assert says(guide, tokenizer, CALL)
    assert not says(guide, tokenizer, CALL.replace('"San Francisco"', "5"))
    assert not says(guide, tokenizer, CALL.replace("weather", "nothing"))
    free = ANALYSIS + "<|channel|>final<|message|>4"
    assert says(guide, tokenizer, free) == (choice == "auto")


def test_a_budget_ends_the_analysis_and_keeps_it_ended(tokenizer: Any) -> None:
    form, _ = form_of(tokenizer)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    limit = form.limit(2, encode)
    guide = BudgetGuide(limit, Vocabulary(tokenizer.backend_tokenizer), len(tokenizer), None)
    for token in encode("<|channel|>analysis<|message|>ab"):
        assert guide.allowed()[token]
        guide.accept(token)
    written = []
    while guide.allowed().sum() == 1:
        written.append(int(guide.allowed().nonzero()))
        guide.accept(written[-1])
    assert tokenizer.decode(written) == "<|end|><|start|>assistant<|channel|>"
    assert not guide.allowed()[encode("analysis")[0]]
    assert guide.allowed()[encode("final")[0]]
