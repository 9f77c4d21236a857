# SPDX-License-Identifier: Apache-2.0
"""The list between ``<TOOLCALL>`` and ``</TOOLCALL>``, read a character at a time."""

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass

from vllm_nanoquant.serving.json_value import BLANK, JsonValue, Malformed

__all__ = ["Arguments", "CallBegin", "CallList"]


@dataclass(frozen=True)
class CallBegin:
    """A call: its place among all calls of the message, and the function's name."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments, JSON as the model wrote it."""

    index: int
    text: str


class CallList:
    """``[{"name": ..., "arguments": {...}}, ...]``, at least one call.

    A call begins as soon as its name and the first character of its arguments are known, in either
    order. Without arguments they are ``{}``; other keys are skipped.

    Args:
        first: index of the list's first call.

    Attributes:
        events: what became certain; the reader takes it away.
        calls: how many calls have begun.
    """

    def __init__(self, first: int) -> None:
        self.events: list[CallBegin | Arguments] = []
        self.calls = 0
        self._first = first
        self._name: str | None = None
        self._begun = False
        self._held = ""  # arguments that no event carries yet
        self._reader = self._read_list()
        next(self._reader)

    def feed(self, char: str) -> bool:
        """Take a character; returns whether the list is complete.

        Raises:
            Malformed: no list of calls goes on like this.
        """
        try:
            self._reader.send(char)
        except StopIteration:
            return True
        return False

    def _read_list(self) -> Generator[None, str, None]:
        _require("[", (yield from _visible()))
        while True:
            _require("{", (yield from _visible()))
            yield from self._read_call()
            char = yield from _visible()
            if char == "]":
                return
            _require(",", char)

    def _read_call(self) -> Generator[None, str, None]:
        """From behind a call's opening brace to its closing one."""
        self._name, self._begun, self._held = None, False, ""
        keys: set[str] = set()
        while True:
            key, char = yield from _read_string((yield from _visible()))
            _require(":", char)
            char = yield from _visible()
            if key in keys:
                raise Malformed
            keys.add(key)
            if key == "name":
                name, char = yield from _read_string(char)
                self._take_name(name)
            elif key == "arguments":
                _require("{", char)
                char = yield from _read_value(char, self._take_argument)
            else:
                char = yield from _read_value(char, _ignore)
            if char == "}":
                break
            _require(",", char)
        if self._name is None:
            raise Malformed
        if "arguments" not in keys:
            self._take_argument("{}")

    def _take_name(self, name: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: could not be sent to anyone
            raise Malformed from None
        if not name:
            raise Malformed
        self._name = name
        self._send()

    def _take_argument(self, text: str) -> None:
        self._held += text
        self._send()

    def _send(self) -> None:
        if self._name is None or not self._held:
            return
        if not self._begun:
            self._begun = True
            self.calls += 1
            self.events.append(CallBegin(self._first + self.calls - 1, self._name))
        self.events.append(Arguments(self._first + self.calls - 1, self._held))
        self._held = ""


def _require(expected: str, char: str) -> None:
    if char != expected:
        raise Malformed


def _ignore(char: str) -> None:
    """Skip the value of a key that means nothing to us."""


def _visible() -> Generator[None, str, str]:
    """The next character that is not blank."""
    while True:
        char = yield
        if char not in BLANK:
            return char


def _read_value(char: str, take: Callable[[str], None]) -> Generator[None, str, str]:
    """Read a value that begins with `char`, giving it to `take`; returns what follows it."""
    value = JsonValue()
    while value.feed(char):
        take(char)
        if value.done:
            return (yield from _visible())
        char = yield
    return char if char not in BLANK else (yield from _visible())


def _read_string(char: str) -> Generator[None, str, tuple[str, str]]:
    """Read a string that begins with `char`; returns it and what follows it."""
    _require('"', char)
    read: list[str] = []
    char = yield from _read_value(char, read.append)
    return json.loads("".join(read)), char
