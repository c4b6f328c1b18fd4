"""Reasoning is told from the answer in every format, however the text is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server.api.output.dialect import Dialects
from nybble.server.api.output.events import Reasoning, Text
from nybble.server.api.output.reasoning import REASONING_FORMATS, Place, ReasoningParser

FORMS = {name: form for form in REASONING_FORMATS for name in form.names}


def split(name: str, place: Place, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(FORMS[name], place)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert all(event.text for event in events if isinstance(event, Reasoning | Text))
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    return thought, "".join(event.text for event in events if isinstance(event, Text))


def cut(text: str, cuts: set[int]) -> list[str]:
    places = sorted(cuts)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# As the families' models write.
CASES: list[tuple[str, Place, str, str, str]] = [
    ("qwen3", "before", "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    ("qwen3", "before", "Four. <think>", "", "Four. <think>"),
    ("qwen3", "before", "  Four.\n", "", "  Four.\n"),
    ("qwen3", "before", "<think>\n\n</think>\n\nFour.", "", "Four."),
    ("qwen3", "inside", "Two\n\nand < two.\n</think>\n\nFour.", "Two\n\nand < two.", "Four."),
    # Some models open what the prompt has opened already.
    ("qwen3", "inside", "<think>\nTwo.</think>Four.", "Two.", "Four."),
    ("qwen3", "inside", "It never ends </th", "It never ends </th", ""),
    ("qwen3", "after", "\n\nFour. </think>", "", "Four. </think>"),
    ("deepseek_r1", "inside", "Two.\n</think>\n\n**Four** ", "Two.", "**Four** "),
    ("exaone_deep", "before", "<thought>\nA.\n</thought>\n\nB.", "A.", "B."),
    ("seed_oss", "before", "<seed:think>A.</seed:think>B.", "A.", "B."),
    ("mistral", "before", "[THINK]A.[/THINK]B.", "A.", "B."),
    ("kimi", "before", "◁think▷A.◁/think▷B.", "A.", "B."),
    (
        "granite",
        "before",
        "Here is my thought process:\nA: b.\n\nHere is my response:\nC.",
        "A: b.",
        "C.",
    ),
    (
        "granite33",
        "before",
        "<think>A.</think><response>B.\n</response>",
        "A.",
        "B.",
    ),
    ("granite33", "before", "<think>A.</think>B.", "A.", "B."),
    ("hunyuan", "before", "<think>\nA\n</think>\n<answer>\nB\n</answer>", "A", "B"),
    (
        "cohere",
        "before",
        "<|START_THINKING|>A.<|END_THINKING|><|START_RESPONSE|>B.<|END_RESPONSE|>",
        "A.",
        "B.",
    ),
    ("cohere", "after", "<|START_RESPONSE|>B.<|END_RESPONSE|>", "", "B."),
    ("granite33", "after", "<response>B.</response> \n", "", "B."),
    ("granite33", "after", "<response>B.</response> \nC.", "", "B.C."),
]


@pytest.mark.parametrize(("name", "place", "text", "thought", "answer"), CASES)
@given(data=st.data())
def test_reasoning_is_split_from_the_answer_however_the_text_is_cut(
    name: str, place: Place, text: str, thought: str, answer: str, data: st.DataObject
) -> None:
    assert split(name, place, [text]) == (thought, answer)
    cuts = data.draw(st.sets(st.integers(0, len(text))))
    assert split(name, place, cut(text, cuts)) == (thought, answer)


PIECES = ("<think>", "</think>", "<thi", "nk>", "</", "<response>", "</response>", " ", "\n", "a")


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    name=st.sampled_from(["qwen3", "granite33"]),
    place=st.sampled_from(["before", "inside", "after"]),
)
def test_no_text_is_too_strange_to_split(text: str, name: str, place: Place) -> None:
    assert split(name, place, list(text)) == split(name, place, [text])


def test_the_tokens_of_reasoning_and_its_markers_are_counted() -> None:
    parser = ReasoningParser(FORMS["qwen3"], "before")
    for piece in ("<think>", "\n", "two", "</think>", "\n\n", "Four"):
        parser.feed(piece, 1)
    assert parser.tokens == 4
    parser = ReasoningParser(FORMS["qwen3"], "before")
    for piece in ("Four", ".", "<think>"):
        parser.feed(piece, 1)
    assert parser.tokens == 0


@pytest.mark.parametrize(
    ("prompt", "continued", "place"),
    [
        ("<|im_start|>assistant\n", False, "before"),
        ("<|im_start|>assistant\n<think>\n", False, "inside"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False, "after"),
        # What a user writes of it is not the answer's.
        ("what is <think>?<|im_end|>\n<|im_start|>assistant\n", False, "before"),
        ("<|im_start|>assistant\n<think>\nTwo", True, "inside"),
        ("<|im_start|>assistant\n<think>\nTwo</think>\nFo", True, "after"),
        ("<|im_start|>assistant\nFo", True, "before"),
    ],
)
def test_the_prompt_says_whether_the_answer_begins_inside(
    prompt: str, continued: bool, place: Place
) -> None:
    assert FORMS["qwen3"].place(prompt, continued=continued) == place


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}<think>\n\n</think>", "think"),
        ("content.split('</think>')[-1]", "think"),
        ("Write your thoughts after 'Here is my thought process:' and", "granite"),
        ("between <think></think> and write your response between <response>", "granite33"),
        ("<|START_THINKING|><|END_THINKING|>", "cohere_command3"),
        ("<|im_start|>{{ m.content }}", None),
    ],
)
def test_the_format_is_read_from_the_chat_template(template: str, name: str | None) -> None:
    found = Dialects().of(template).reasoning
    assert (None if found is None else found.names[0]) == name


def test_the_format_can_be_named() -> None:
    def named(name: str, template: str = "") -> Any:
        return Dialects(reasoning=name).of(template).reasoning

    assert named("none", "<think>") is None
    assert named("deepseek_r1").place("<|Assistant|>", continued=False) == "inside"
    assert named("granite", "<think>").close == "Here is my response:"
    assert Dialects().of("<|channel|>").harmony
    assert not Dialects(reasoning="none").of("<|channel|>").harmony


def test_a_template_may_write_more_behind_the_marker() -> None:
    prompt = "<seed:bos>assistant\n<seed:think><seed:cot_budget_reflect>"  # with no budget
    assert FORMS["seed_oss"].place(prompt, continued=False) == "inside"
