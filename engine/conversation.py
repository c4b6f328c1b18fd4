"""A conversation as chat templates take it, and the text they make of it as token ids.

Serving and fine-tuning read conversations in the same way, by what is here. Rendering itself is
theirs: a server does not trust a checkpoint's template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from tokenizers import AddedToken, Tokenizer

from nybble.loaders.adapter_tokens import TextTokenizer
from nybble.loaders.templates import TemplateRefusedError

Turn = dict[str, Any]

# Put into what looks like a marker in a message's text, so that it is none in the rendered text. A
# code point that Unicode keeps for a program's own use inside; doubled, it stands for itself.
_SHIELD = "\ufdd0"
_UNSHIELDED = re.compile(f"{_SHIELD}({_SHIELD}?)")
# What an assistant thought before it spoke: vLLM's name for it, DeepSeek's and gpt-oss'.
_THOUGHTS = ("reasoning", "reasoning_content", "thinking")
# Whose text is the model's own or its developer's, who may write what is no control token.
_TRUSTED_ROLES = ("system", "assistant")


def read_template(path: Path) -> str:
    """A chat template of one's own, in a file. Raises OSError and ValueError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the chat template {path} is not a text in UTF-8") from None


def template_of(tokenizer: TextTokenizer, *, tools: bool) -> str | None:
    """The chat template for a conversation with or without tools; None where there is none.

    Raises ValueError where a checkpoint has several and none of them is the default.
    """
    return chosen_template(tokenizer.chat_template, tools=tools)


def chosen_template(templates: str | Mapping[str, str] | None, *, tools: bool) -> str | None:
    """As :func:`template_of`, of a template or of several by name."""
    if not isinstance(templates, Mapping):
        return templates or None
    if tools and "tool_use" in templates:
        return str(templates["tool_use"])
    if len(templates) > 1 and "default" not in templates:
        raise ValueError(
            f"it has the chat templates {', '.join(sorted(templates))}, and none called 'default'"
        )
    return str(templates.get("default") or next(iter(templates.values()), "")) or None


def turn_of(message: Mapping[str, Any]) -> Turn:
    """A message as templates expect it: plain text, arguments of tool calls as objects.

    What is empty is left out: a template that looks for calls would find a list of none. Arguments
    that are no JSON object, as those of an answer that was cut short, stay the text they are.

    Raises ValueError if it has no role or its content is not text.
    """
    turn = {name: value for name, value in message.items() if value is not None and value != []}
    if not isinstance(turn.get("role"), str):
        raise ValueError("a message needs a role: system, user, assistant or tool")
    thought = next((turn.pop(name) for name in _THOUGHTS if isinstance(turn.get(name), str)), None)
    if thought:
        # Each family's template reads its own of these names, and leaves out what it does not show.
        turn |= dict.fromkeys(_THOUGHTS, thought)
        if turn.get("tool_calls") and turn.get("content"):
            del turn["thinking"]  # gpt-oss' template takes one of the two before a call
    if turn["role"] == "developer":  # the newer name of the system's role
        turn["role"] = "system"
    content = turn.get("content", "")
    if isinstance(content, list):
        content = "\n".join(map(_text_of, content))
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is {content!r:.50}, expected text")
    turn["content"] = content
    if "tool_calls" in turn:
        turn["tool_calls"] = [_with_arguments(call, _object_or_text) for call in turn["tool_calls"]]
    return turn


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise ValueError(f"a part of a message is {part!r:.50}, expected text")
    return text


def in_other_forms(turns: Sequence[Turn]) -> list[list[Turn]]:
    """``turns`` in the other forms in which templates take the arguments of calls."""
    whole = [with_whole_calls(turns)] if has_broken_calls(turns) else []
    return [*whole, with_text_calls(turns)] if has_calls(turns) else []


def with_tools(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """``turns`` with the functions of ``tools`` in the system's message, as Phi-4-mini reads
    them."""
    functions = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    first = turns[0] if turns and turns[0]["role"] == "system" else None
    system = {"role": "system", "content": ""} if first is None else first
    return [{**system, "tools": functions}, *(turns if first is None else turns[1:])]


def has_broken_calls(turns: Sequence[Turn]) -> bool:
    """Whether arguments of some call are no JSON object."""
    return any(
        isinstance(call["function"].get("arguments"), str)
        for turn in turns
        for call in turn.get("tool_calls", ())
    )


def with_whole_calls(turns: Sequence[Turn]) -> list[Turn]:
    """For templates that take arguments as objects only: as much of broken ones as can be read."""
    return [
        turn
        if "tool_calls" not in turn
        else {
            **turn,
            "tool_calls": [_with_arguments(call, _as_object) for call in turn["tool_calls"]],
        }
        for turn in turns
    ]


def with_text_calls(turns: Sequence[Turn]) -> list[Turn]:
    """For templates that put the text of arguments together with other texts, as DeepSeek's."""
    return [
        turn
        if "tool_calls" not in turn
        else {
            **turn,
            "tool_calls": [_with_arguments(call, _as_text) for call in turn["tool_calls"]],
        }
        for turn in turns
    ]


def has_calls(turns: Sequence[Turn]) -> bool:
    """Whether a tool is called in some turn."""
    return any("tool_calls" in turn for turn in turns)


def with_short_ids(turns: Sequence[Turn]) -> list[Turn]:
    """For Mistral's templates, which take ids of calls of nine letters and digits only."""
    found = []
    for turn in map(dict, turns):
        if "tool_call_id" in turn:
            turn["tool_call_id"] = _short(turn["tool_call_id"])
        if "tool_calls" in turn:
            calls = turn["tool_calls"]
            turn["tool_calls"] = [{**call, "id": _short(call.get("id"))} for call in calls]
        found.append(turn)
    return found


def _short(id: object) -> str:
    letters = re.sub("[^A-Za-z0-9]", "", id if isinstance(id, str) else "")
    return letters[-9:].rjust(9, "0")


def in_parts(turns: Sequence[Turn]) -> list[Turn]:
    """Turns with their content as a list of parts, as templates of multi-modal models read it."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


# A conversation whose text is in no template: whether it is shown tells the form a template takes,
# where a short text of a user's may be in the prompt by chance.
PROBE: Sequence[Turn] = ({"role": "user", "content": "Vexing quartz 7094 jumbo fjord"},)


def left_out(turns: Sequence[Turn], text: str) -> int | None:
    """The first of ``turns`` whose text is not in ``text``, which a template made of them; or None.

    A template may trim a text, write it as JSON, and leave out what the assistant thought.
    """
    position = 0
    for index, turn in enumerate(turns):
        wanted = turn["content"].strip()
        if turn["role"] == "assistant":
            wanted = wanted.rpartition("</think>")[2].strip()
        if not wanted:
            continue
        for form in (
            wanted,
            json.dumps(wanted, ensure_ascii=False)[1:-1],
            json.dumps(wanted)[1:-1],
        ):
            # Turns follow each other, but for those a template moves.
            found = text.find(form, position)
            if found >= 0:
                position = found + len(form)
                break
            if form in text:
                break
        else:
            return index
    return None


# Makes text of turns by a chat template. Raises TemplateRefusedError if the template refuses them.
Render = Callable[[Sequence[Turn]], str]


def takes_parts(render: Render) -> bool:
    """Whether a template reads content as a list of parts and shows nothing of a text."""

    def shows(probe: Sequence[Turn]) -> bool:
        try:
            return left_out(PROBE, render(probe)) is None
        except TemplateRefusedError:
            return False

    return not shows(PROBE) and shows(in_parts(PROBE))


def rendered(turns: Sequence[Turn], render: Render, *, parts: bool) -> str:
    """``turns`` as text, in the form in which the template takes their content.

    parts: what :func:`takes_parts` says of the template. The other form is tried too: a template
    may take a user's text in one form and a tool's in the other.

    Raises TemplateRefusedError if the template refuses the turns or leaves out the text of one.
    """
    refusal: TemplateRefusedError | None = None
    for in_this_form in (parts, not parts):
        shown = in_parts(turns) if in_this_form else turns
        text = None
        for form in (shown, *in_other_forms(shown)):
            try:
                text = render(form)
                break
            except TemplateRefusedError as error:
                refusal = refusal or error
        if text is None:
            continue
        missing = left_out(turns, text)
        if missing is None:
            return text
        refusal = refusal or TemplateRefusedError(
            f"the text of message {missing} (of role {turns[missing]['role']}) is not in the "
            "prompt it makes"
        )
    assert refusal is not None
    raise refusal


class ChatEncoder:
    """Text that a template made of turns, as token ids.

    A marker is a token of its own that structures conversations: a special one, as ``<|im_end|>``,
    or one the template writes, as ``<tool_call>``. One that a user or a tool has written is text
    like any other; so is a special one in anybody's message. A system's and the assistant's may
    have the others, as the model itself writes them.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._added: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        self._special = {token.content for token in self._added.values() if token.special}
        self._plain: _PlainTokenizer | None = None
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}

    def shielded(self, turns: Sequence[Turn], template: str) -> list[Turn]:
        """``turns`` so that a text made of them shows what in it the template has written."""
        anybody = self._pattern(self._special)
        markers = self._pattern(self._markers(template))
        return [
            {
                name: value
                if name == "role"
                else _shielded(value, anybody if turn["role"] in _TRUSTED_ROLES else markers)
                for name, value in turn.items()
            }
            for turn in turns
        ]

    def encode(self, text: str, *, shielded: bool = True) -> list[int]:
        """Token ids of a text made of shielded turns or of others, without what inputs begin with.

        As the tokenizer's own where no message has a marker in its text.
        """
        if shielded and _SHIELD in text:
            return self._without_markers().encode(text)
        return _encode(self._backend, text)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of ``text`` in which nothing is a marker."""
        return self._without_markers().encode_plain(text)

    def _markers(self, template: str) -> set[str]:
        return self._special | {
            token.content
            for token in self._added.values()
            if _is_word(token) and token.content in template
        }

    def _pattern(self, markers: set[str]) -> re.Pattern[str]:
        """Finds the first character of each, overlapping ones too."""
        key = frozenset(markers)
        if key not in self._patterns:
            longer = [re.escape(marker[0]) + f"(?={re.escape(marker[1:])})" for marker in key]
            self._patterns[key] = re.compile("|".join([*longer, _SHIELD]))
        return self._patterns[key]

    def _without_markers(self) -> _PlainTokenizer:
        if self._plain is None:
            self._plain = _PlainTokenizer(self._backend, self._added)
        return self._plain


class _PlainTokenizer:
    """A model's tokenizer in which added tokens have other spellings, which nobody can know."""

    def __init__(self, backend: Tokenizer, added: Mapping[int, AddedToken]) -> None:
        model = backend.model
        self._tokenizer = Tokenizer(model)  # shares the vocabulary
        if backend.normalizer is not None:
            self._tokenizer.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._tokenizer.pre_tokenizer = backend.pre_tokenizer
        # New tokens are numbered from the vocabulary's size, which its ids may exceed.
        vocabulary = backend.get_vocab(with_added_tokens=False)
        gap = max(vocabulary.values(), default=-1) + 1 - len(vocabulary)
        secret = secrets.token_hex(16)
        self._tokenizer.add_tokens([f"{secret}gap{index}" for index in range(gap)])
        self._spellings: dict[str, str] = {}
        self._ids: dict[int, int] = {}
        for number, token in added.items():
            spelling = token.content
            if _is_word(token):
                spelling = self._spellings[token.content] = f"<{secret}i{number}>"
            renamed = AddedToken(
                spelling,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            self._tokenizer.add_tokens([renamed])
            renamed_id = self._tokenizer.token_to_id(spelling)
            assert renamed_id is not None  # it was added just now
            self._ids[renamed_id] = number
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # Some vocabularies have a marker among the pieces of text too.
        self._pieces = {
            number: self._letters(vocabulary, token.content)
            for number, token in added.items()
            if token.content in self._spellings and token.content in vocabulary
        }

    def encode(self, text: str) -> list[int]:
        """Of shielded text: what is not shielded is a marker."""
        renamed, position = "", 0
        for found in self._pattern.finditer(text):
            renamed += _unshielded(text[position : found.start()]) + self._spellings[found[0]]
            position = found.end()
        return self.encode_plain(renamed + _unshielded(text[position:]))

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for token in _encode(self._tokenizer, text):
            if token in self._ids:
                ids.append(self._ids[token])
            else:
                ids += self._pieces.get(token, (token,))
        return ids

    def _letters(self, vocabulary: Mapping[str, int], text: str) -> list[int]:
        ids: list[int] = []
        for letter in text:
            if letter in vocabulary:
                ids.append(vocabulary[letter])
            else:
                ids += _encode(self._tokenizer, letter)
        return ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # The batch form lets other threads run meanwhile; the single one does not. The fast one leaves
    # out where in the text each token stands.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return list(encoding.ids)


def _is_word(token: AddedToken) -> bool:
    """Not so the runs of spaces and line breaks that some models have as added tokens."""
    return token.special or any(map(str.isalnum, token.content))


def _shielded(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda found: found[0] + _SHIELD, value)
    if isinstance(value, list):
        return [_shielded(each, pattern) for each in value]
    if isinstance(value, dict):
        return {_shielded(name, pattern): _shielded(each, pattern) for name, each in value.items()}
    return value


def _unshielded(text: str) -> str:
    return _UNSHIELDED.sub(r"\1", text)


def _with_arguments(call: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": read(function.get("arguments"))}}


def _object_or_text(arguments: Any) -> Any:
    try:
        # As bodies are read: half a surrogate pair, for one, is no text that can be encoded.
        value = from_json(arguments or "{}", allow_inf_nan=False)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = from_json(arguments, allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
