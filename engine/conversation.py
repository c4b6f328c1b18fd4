"""A conversation as chat templates take it, and the text they make of it as token ids.

Serving and fine-tuning read conversations in the same way, by what is here. Rendering itself is
theirs: a server does not trust a checkpoint's template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic_core import from_json
from tokenizers import AddedToken, Tokenizer

from nybble.loaders.adapter_tokens import TextTokenizer
from nybble.loaders.templates import TemplateRefusedError

T = TypeVar("T")
Turn = dict[str, Any]
# Schemas of functions, as OpenAI writes them.
Tools = Sequence[Mapping[str, Any]]

# Put into what looks like a marker in a message's text, so that it is none in the rendered text. A
# code point that Unicode keeps for a program's own use inside; doubled, it stands for itself.
_SHIELD = "\ufdd0"
_UNSHIELDED = re.compile(f"{_SHIELD}({_SHIELD}?)")
# What an assistant thought before it spoke: vLLM's name for it, DeepSeek's and gpt-oss'.
_THOUGHTS = ("reasoning", "reasoning_content", "thinking")
# Whose text is the model's own or its developer's, who may write what is no control token.
_TRUSTED_ROLES = ("system", "assistant")
# In Mistral's templates, which take ids of calls of nine letters and digits only.
_SHORT_IDS = "[TOOL_CALLS]"
# Templates about which something is remembered. A model has one or two; trusted clients may send
# their own.
_MAX_TEMPLATES = 16


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

    Raises ValueError if it has no role, its content is not text, or a call in it is none.
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
        calls = [_in_order(_required_call(call)) for call in turn["tool_calls"]]
        turn["tool_calls"] = [_with_arguments(call, _object_or_text) for call in calls]
    return turn


def _required_call(call: object) -> Mapping[str, Any]:
    if isinstance(call, Mapping):
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return call
    raise ValueError(f"a tool call is {call!r:.50}, expected a function with name and arguments")


def _in_order(of_function: Mapping[str, Any]) -> dict[str, Any]:
    """A call or a tool with its fields in OpenAI's order, in which templates write them, and
    without those that say nothing: files of conversations have them in any order."""

    def ordered(value: Mapping[str, Any], *first: str) -> dict[str, Any]:
        return {name: value[name] for name in (*first, *value) if value.get(name) is not None}

    found = ordered(of_function, "id", "type", "function")
    if isinstance(function := found.get("function"), Mapping):
        found["function"] = ordered(function, "name", "description", "parameters")
    return found


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise ValueError(f"a part of a message is {part!r:.50}, expected text")
    return text


def in_other_forms(turns: Sequence[Turn]) -> list[list[Turn]]:
    """``turns`` in the other forms in which templates take the arguments of calls."""
    whole = [with_whole_calls(turns)] if has_broken_calls(turns) else []
    return [*whole, with_text_calls(turns)] if has_calls(turns) else []


def with_tools(turns: Sequence[Turn], tools: Tools) -> list[Turn]:
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


# A conversation whose text is in no template, and a function: whether they are shown tells the form
# that a template takes, where a short text of a user's may be in the prompt by chance.
_PROBE_TEXT, _PROBE_NAME = "Vexing quartz 7094 jumbo fjord", "vexing_quartz_7094"
_PROBE: Sequence[Turn] = ({"role": "user", "content": _PROBE_TEXT},)
_PROBE_TOOLS: Tools = (
    {
        "type": "function",
        "function": {
            "name": _PROBE_NAME,
            "description": "Jumbo fjord",
            "parameters": {
                "type": "object",
                "properties": {"depth": {"type": "string", "description": "in fathoms"}},
                "required": ["depth"],
            },
        },
    },
)


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


class Render(Protocol):
    """Makes text of turns and tools by a chat template. Raises TemplateRefusedError."""

    def __call__(
        self, template: str, turns: Sequence[Turn], tools: Tools | None, variables: dict[str, Any]
    ) -> Awaitable[str]: ...


@dataclass(frozen=True)
class _Form:
    """The form in which a chat template takes a conversation.

    parts: whether it reads content as a list of parts, and shows nothing of a text.
    tools_in_system: whether it reads tools from the system's message, and shows no others.
    """

    parts: bool
    tools_in_system: bool

    @classmethod
    async def of(
        cls, render: Callable[[Sequence[Turn], Tools | None], Awaitable[str]], *, tools: bool
    ) -> _Form:
        """Of the template that ``render`` renders. tools: whether there are any to be shown."""

        async def shows(wanted: str, turns: Sequence[Turn], tools: Tools | None) -> bool:
            try:
                return wanted in await render(turns, tools)
            except TemplateRefusedError:
                return False

        parts = not await shows(_PROBE_TEXT, _PROBE, None) and (
            await shows(_PROBE_TEXT, in_parts(_PROBE), None)
        )
        if not tools or await shows(_PROBE_NAME, _content(_PROBE, parts=parts), _PROBE_TOOLS):
            return cls(parts, tools_in_system=False)
        probe = _content(with_tools(_PROBE, _PROBE_TOOLS), parts=parts)
        return cls(parts, tools_in_system=await shows(_PROBE_NAME, probe, _PROBE_TOOLS))

    def all(self, turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
        """``turns`` as the template takes them, and then in other forms: one may take a user's
        content as text and a tool's as parts."""
        for parts in (self.parts, not self.parts):
            shown = _content(turns, parts=parts)
            yield from (shown, *in_other_forms(shown))


def _content(turns: Sequence[Turn], *, parts: bool) -> Sequence[Turn]:
    return in_parts(turns) if parts else turns


class Aside(Protocol):
    """Computes a function's result, for a text of some length: aside from others if it is long."""

    async def __call__(self, length: int, function: Callable[[], T]) -> T: ...


async def _here(length: int, function: Callable[[], T]) -> T:
    return function()


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        found: T = done.value
        return found
    raise RuntimeError("it waits for something")


class ChatEncoder:
    """Conversations and other texts as token ids, in between as the text that a template makes.

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
        self._forms: dict[tuple[str, bool], _Form] = {}  # of templates, without tools and with

    def with_tokenizer(self, tokenizer: TextTokenizer) -> ChatEncoder:
        """The same for an adapter with tokens of its own."""
        other = ChatEncoder(tokenizer)
        other._forms = self._forms
        return other

    async def rendered(
        self,
        template: str,
        turns: Sequence[Turn],
        tools: Tools | None,
        variables: Mapping[str, Any],
        render: Render,
        *,
        shielded: bool = True,
        length: int = 0,
        aside: Aside = _here,
    ) -> str:
        """The text that a template makes of turns and tools, in the form in which it takes them.

        variables: those of the template beside messages, tools and special tokens.
        shielded: whether what looks like a marker in a turn is text (see :meth:`encode`).
        length: how long the turns are.
        aside: computes what takes long for a text of some length.

        Raises TemplateRefusedError if the template refuses the turns or leaves out the text of one.
        """
        special = dict(self._tokenizer.special_tokens_map)
        form = self._forms.get((template, bool(tools)))
        if form is None:
            form = await _Form.of(
                lambda probe, shown: render(template, probe, shown, special), tools=bool(tools)
            )
            if len(self._forms) >= _MAX_TEMPLATES:
                self._forms.clear()
            self._forms[template, bool(tools)] = form
        if _SHORT_IDS in template:
            turns = with_short_ids(turns)
        tools = tools and list(map(_in_order, tools))
        if tools and form.tools_in_system:
            turns = with_tools(turns, tools)
        if shielded:
            turns = await aside(length, partial(self.shielded, turns, template))
        refusal: TemplateRefusedError | None = None
        for shown in form.all(turns):
            try:
                text = await render(template, shown, tools, {**special, **variables})
            except TemplateRefusedError as error:
                refusal = refusal or error
                continue
            missing = await aside(len(text), partial(left_out, turns, text))
            if missing is None:
                return text
            refusal = refusal or TemplateRefusedError(
                f"the text of message {missing} (of role {turns[missing]['role']}) is not in the "
                "prompt it makes"
            )
        assert refusal is not None
        raise refusal

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

    def encode_inputs(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts as inputs of the model, with the special tokens :attr:`around` them.

        A text that begins with BOS gets no second one.
        """
        # Encoding a batch releases the GIL, and encoding a single text does not. The fast form does
        # not compute each token's position in the text.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=True)
        ids = [tuple(encoding.ids) for encoding in encodings]
        return list(map(self._with_one_bos, texts, ids))

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens with which the model's inputs begin and end."""
        bare, (whole,) = tuple(_encode(self._backend, "a")), self.encode_inputs(["a"])
        at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    def _with_one_bos(self, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        bos, spelled = self._tokenizer.bos_token_id, self._tokenizer.bos_token
        if spelled and text.startswith(spelled) and ids[:2] == (bos, bos):
            # If the tokenizer adds no BOS, both are the text's own and stay.
            return ids[1:] if ids[0] in self.around[0] else ids
        return ids

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
