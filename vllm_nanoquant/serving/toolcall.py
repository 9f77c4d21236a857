# SPDX-License-Identifier: Apache-2.0
"""Nemotron Nano v2's tool calls, read as the text arrives: ``<TOOLCALL>[{...}, ...]</TOOLCALL>``.

No vLLM here. Text goes in, in pieces cut anywhere; events come out as early as they are certain.
How the text was cut makes no difference to what comes out in all.
"""

from dataclasses import dataclass, field

from vllm_nanoquant.serving.call_list import Arguments, CallBegin, CallList
from vllm_nanoquant.serving.json_value import BLANK, Malformed

__all__ = [
    "CLOSE",
    "OPEN",
    "Arguments",
    "Broken",
    "Call",
    "CallBegin",
    "Content",
    "Event",
    "ToolCallScanner",
    "parse_tool_calls",
    "possible_tag",
]

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"


@dataclass(frozen=True)
class Content:
    """Text that is no tool call."""

    text: str


@dataclass(frozen=True)
class Broken:
    """A block that is no list of calls, or ended too early.

    `unsent` is the end of it that no event has carried, `text` all of it up to the fault, `calls`
    how many of its calls have begun.
    """

    unsent: str
    text: str
    calls: int


Event = Content | CallBegin | Arguments | Broken


@dataclass
class Call:
    """A whole call; its arguments are JSON as the model wrote it."""

    name: str
    arguments: str = ""


@dataclass
class _Block:
    """A block that is being read: its list, all its text, and what no event has carried."""

    calls: CallList
    text: list[str] = field(default_factory=lambda: [OPEN])
    unsent: list[str] = field(default_factory=lambda: [OPEN])


def possible_tag(text: str, tag: str) -> int:
    """Length of the end of `text` with which `tag` may begin, short of the whole tag."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


class ToolCallScanner:
    """Turns the text of one message into events; never raises, whatever the text.

    Where a message has calls and otherwise only blank text, that text is dropped.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._calls = 0
        self._text = ""  # may become a tag: an opening one, or behind a list its closing one
        self._behind_list = False
        self._blank: str | None = ""  # leading blank text; None once there was other text
        self._block: _Block | None = None

    def feed(self, text: str) -> list[Event]:
        """Events that the next piece of text makes certain."""
        while text:
            if self._block is not None:
                text = self._read_block(self._block, text)
            elif self._behind_list:
                text = self._read_closing_tag(text)
            else:
                text = self._read_content(text)
        return self._taken()

    def finish(self) -> list[Event]:
        """Events at the end of the message: text held back, a block that is not complete."""
        if self._block is not None:
            self._break(self._block)
        elif not self._behind_list:
            self._say(self._text)
        if self._blank and not self._calls:
            self._events.append(Content(self._blank))
        self._text = self._blank = ""
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        if self._blank is not None:
            text = self._blank + text
            self._blank = None if text.strip() else text
        if self._blank is None and text:
            self._events.append(Content(text))

    def _read_content(self, text: str) -> str:
        """Read up to and with an opening tag; returns what follows."""
        before, tag, after = (self._text + text).partition(OPEN)
        certain = len(before) - (0 if tag else possible_tag(before, OPEN))
        self._text = before[certain:]
        self._say(before[:certain])
        if tag:
            self._block = _Block(CallList(self._calls))
        return after

    def _read_block(self, block: _Block, text: str) -> str:
        """Read to the end of a list of calls, or to its first fault; returns what follows."""
        for place, char in enumerate(text):
            try:
                complete = block.calls.feed(char)
            except Malformed:
                self._break(block)
                return text[place:]  # this character may begin the next block
            block.text.append(char)
            block.unsent.append(char)
            if block.calls.events:
                block.unsent.clear()
                self._pass_on(block.calls)
            if complete:
                self._block, self._behind_list = None, True
                return text[place + 1 :]
        return ""

    def _pass_on(self, calls: CallList) -> None:
        for event in calls.events:
            last = self._events[-1] if self._events else None
            if isinstance(event, Arguments) and isinstance(last, Arguments):
                self._events[-1] = Arguments(event.index, last.text + event.text)
                continue
            self._calls += isinstance(event, CallBegin)
            self._events.append(event)
        calls.events.clear()

    def _break(self, block: _Block) -> None:
        if self._blank:
            self._events.append(Content(self._blank))
        self._blank = None
        whole, unsent = "".join(block.text), "".join(block.unsent)
        self._events.append(Broken(unsent, whole, block.calls.calls))
        self._block = None

    def _read_closing_tag(self, text: str) -> str:
        """Skip the closing tag; returns what follows, or the text if that is something else."""
        text, self._text = self._text + text, ""
        rest = text.lstrip(BLANK)
        if len(rest) < len(CLOSE) and CLOSE.startswith(rest):
            self._text = text
            return ""
        self._behind_list = False
        return rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else text


def parse_tool_calls(text: str) -> tuple[list[Call], str]:
    """The calls of a whole message, and its content; never raises.

    A block that is broken or not complete is content, every character of it.
    """
    scanner = ToolCallScanner()
    calls: list[Call] = []
    content: list[str] = []
    for event in scanner.feed(text) + scanner.finish():
        match event:
            case Content():
                content.append(event.text)
            case CallBegin():
                calls.append(Call(event.name))
            case Arguments():
                calls[-1].arguments += event.text
            case Broken():
                del calls[len(calls) - event.calls :]
                content.append(event.text)
    return calls, "".join(content)
