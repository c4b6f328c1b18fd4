"""Finds tool calls in generated text as it arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nybble.server.api.output.calls import CallReader
from nybble.server.api.output.events import Arguments, Call, ParsedDelta, Text
from nybble.server.api.output.json_calls import JsonReader
from nybble.server.api.output.markers import first_of, may_become, unsettled
from nybble.server.api.output.tool_formats import ToolFormat

_SPACE = " \t\r\n"


class ToolParser:
    """Turns the text of one sequence into events. What only looked like a call is text."""

    def __init__(self, form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        """schemas: of the parameters of the tools, by their names."""
        self._form = form
        self._schemas = schemas
        self._buffer = ""
        # unmarked: what came so far may be calls without markers. start: the answer's first
        # character is to come. text: outside of calls. lead: before a call. call: inside one.
        # after: behind one. plain: no call can come any more.
        self._state: Literal["unmarked", "start", "text", "lead", "call", "after", "plain"] = (
            "unmarked" if form.unmarked else "start" if form.bare else "text"
        )
        self._bare = _BareCalls(schemas)
        self._lead = form.lead  # the pieces that may still come before the call
        self._raw = ""  # the text of what may be a call, as it came
        self._reader: CallReader = form.call.reader(schemas)
        self._begun = False  # whether an event for the current call has been returned
        self._inside = False  # whether more calls may follow without a marker
        self.calls = 0

    def feed(self, text: str) -> list[ParsedDelta]:
        """Add text. Returns the events that are certain now; the rest is held back."""
        self._buffer += text
        events: list[ParsedDelta] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[ParsedDelta]:
        """The events of the text that was held back. Call it once, after the last ``feed``."""
        if self._state == "unmarked":
            if calls := self._bare.whole():
                return [event for call in calls for event in self._told(*call)]
            self._state, self._buffer = "text", self._bare.text
            return [*self.feed(""), *self.finish()]
        held, self._buffer = self._buffer, ""
        if self._state == "lead" or (self._state == "call" and not self._begun):
            held = self._raw + held
        elif self._state in ("call", "after"):
            return []
        if self.calls and not held.strip():
            return []
        return [Text(held)] if held else []

    def _step(self, events: list[ParsedDelta]) -> bool:
        """Consume something from the buffer; False if more text is needed first."""
        if self._state == "unmarked":
            text, self._buffer = self._buffer, ""
            if self._bare.feed(text):
                return False
            self._state, self._buffer = "text", self._bare.text
            return True
        if self._state == "start":
            return self._start()
        if self._state == "text":
            return self._find(events)
        if self._state == "lead":
            return self._skip_lead()
        if self._state == "call":
            return self._read_call(events)
        if self._state == "after":
            return self._behind_call()
        if self._buffer:
            events.append(Text(self._buffer))
            self._buffer = ""
        return False

    def _told(self, name: str, arguments: str) -> list[ParsedDelta]:
        index = self.calls
        self.calls += 1
        return [Call(index, name), Arguments(index, arguments)]

    def _start(self) -> bool:
        """At the beginning of an answer which consists of calls alone, or has none."""
        text = self._buffer.lstrip()
        marker = next((each for each in self._form.markers if text.startswith(each)), None)
        if marker is not None:
            self._begin_lead(self._buffer[: len(self._buffer) - len(text)] + marker, marker)
            self._buffer = text[len(marker) :]
        elif not text or may_become(self._form.markers, text):
            return False
        elif not self._form.lead and self._form.call.begins(text[0]):
            self._begin_lead(self._buffer[: len(self._buffer) - len(text)], "")
            self._buffer = text
        else:
            self._state = "plain"
        return True

    def _find(self, events: list[ParsedDelta]) -> bool:
        found = first_of(self._form.markers, self._buffer)
        if found is None:
            # Hold back what may be the beginning of a marker, and white space, which is dropped if
            # a call follows.
            keep = unsettled(self._form.markers, self._buffer)
            settled = self._buffer[: len(self._buffer) - keep].rstrip()
            if settled:
                events.append(Text(settled))
                self._buffer = self._buffer[len(settled) :]
            return False
        at, marker = found
        before, rest = self._buffer[:at].rstrip(), self._buffer[at:]
        if before:
            events.append(Text(before))
        consumed = "" if marker in self._form.starts else marker
        self._begin_lead(consumed, marker)
        self._buffer = rest[len(consumed) :]
        return True

    def _begin_lead(self, raw: str, marker: str) -> None:
        """Expect what comes between ``marker``, which has been read, and a call."""
        lead = self._form.lead
        if marker in self._form.starts:
            lead = ()
        elif marker in lead:
            lead = lead[lead.index(marker) + 1 :]
        elif marker:  # another text in the place of the first piece
            lead = lead[1:]
        self._state, self._lead, self._raw = "lead", lead, raw
        self._reader, self._begun = self._form.call.reader(self._schemas), False

    def _skip_lead(self) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        piece = next((each for each in self._lead if text.startswith(each)), None)
        if piece is None:
            if may_become(self._lead, text):
                return False
            skipped = len(self._buffer) - len(text)
            self._state = "call"
        else:
            skipped = len(self._buffer) - len(text) + len(piece)
            self._lead = self._lead[self._lead.index(piece) + 1 :]
        self._raw += self._buffer[:skipped]
        self._buffer = self._buffer[skipped:]
        return True

    def _known(self, name: str) -> bool:
        # A whole answer in JSON need not be a call. Between markers it always is one: if the tool
        # does not exist, the client can tell the model so.
        return not self._form.bare or name in self._schemas

    def _read_call(self, events: list[ParsedDelta]) -> bool:
        reader, text = self._reader, self._buffer
        self._buffer = reader.feed(text)
        # What comes back may have been held back before.
        self._raw = (self._raw + text).removesuffix(self._buffer)
        if not self._begun and reader.name is not None and self._known(reader.name):
            self._begun = True
            events.append(Call(self.calls, reader.name))
            self.calls += 1
        if self._begun and (arguments := reader.take_arguments()):
            events.append(Arguments(self.calls - 1, arguments))
        failed = reader.failed or (not self._begun and (reader.done or reader.name is not None))
        if failed and not self._begun:
            if not self._raw:  # the text with which a call may begin, and does not here
                _, self._raw = first_of(self._form.starts, self._buffer) or (0, self._buffer)
                self._buffer = self._buffer[len(self._raw) :]
            events.append(Text(self._raw))
            self._state = "plain" if self._form.bare else "text"
        elif reader.done or failed:
            if not reader.has_arguments:
                events.append(Arguments(self.calls - 1, "{}"))
            self._state = "after"
            self._inside = bool(self._form.closing) or self._form.bare
        else:
            return False
        return True

    def _behind_call(self) -> bool:
        """Skip what stands between calls. Another call may begin, or text."""
        form, closing = self._form, [piece.strip() for piece in self._form.closing]
        separators = _SPACE + (",;" if self._inside else "")
        text = self._buffer.lstrip(separators)
        if not text:
            if self._inside:
                self._buffer = ""
            return False
        pieces = [each for each in (*map(str.strip, form.after), *closing) if each]
        piece = next((each for each in pieces if text.startswith(each)), None)
        if piece is not None:
            self._buffer = text[len(piece) :]
            if closing and piece == closing[-1]:
                self._inside = False
            if not self._inside and piece == pieces[-1]:
                self._state = "text"
            return True
        before = [each for each in map(str.strip, form.before) if each]
        if may_become((*pieces, *(before if self._inside else ())), text):
            return False
        if self._inside and (text.startswith(before[0]) if before else form.call.begins(text[0])):
            self._begin_lead("", before[0] if before else "")
            self._buffer = text[len(before[0]) :] if before else text
        else:
            self._state = "plain" if form.bare else "text"
            self._buffer = text
        return True


class _BareCalls:
    """An answer which may consist of calls without markers. Only its end shows whether it does."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names
        self._reader: JsonReader | None = None
        self._calls: list[tuple[str, str]] = []
        self.text = ""

    def feed(self, text: str) -> bool:
        """Add text. Returns whether all of the text so far can still be calls to known tools."""
        self.text += text
        while text := text if self._reader else text.lstrip():
            if self._reader is None:
                if text[0] != "{":
                    return False
                self._reader = JsonReader()
            reader = self._reader
            text = reader.feed(text)
            known = reader.name is None or reader.name in self._names
            if reader.failed or reader.has_more or not known:
                return False
            if reader.done:
                arguments = reader.take_arguments()
                if reader.name is None or not arguments.startswith("{"):
                    return False
                self._calls.append((reader.name, arguments))
                self._reader = None
        return True

    def whole(self) -> list[tuple[str, str]]:
        """Name and arguments of each call if the answer ends here; none if a call is incomplete."""
        return self._calls if self._reader is None else []
