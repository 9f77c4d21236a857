# SPDX-License-Identifier: Apache-2.0
"""One JSON value, recognised a character at a time."""

import regex

__all__ = ["BLANK", "JsonValue", "Malformed"]

BLANK = " \t\n\r"
"""What JSON takes for white space."""

_SCALAR = regex.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_SCALAR_CHARACTERS = frozenset("0123456789+-.eEtrufalsn")
_LONGEST_SCALAR = 4096
_HEX = frozenset("0123456789abcdefABCDEF")


class Malformed(Exception):
    """The text cannot be continued to what was expected."""


class JsonValue:
    """The strict grammar of JSON (RFC 8259), without recursion, so nesting has no limit.

    A number may have 4096 characters: Python reads no longer integers either.

    Attributes:
        done: the value is complete.
    """

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []  # closing brackets that are due
        self._state = "value"
        self._is_key = False
        self._hex_digits = 0
        self._scalar = ""

    def feed(self, char: str) -> bool:
        """Take a character.

        Returns:
            Whether it belongs to the value. A number that is the value itself is over only when
            something else follows it.

        Raises:
            Malformed: no JSON value goes on like this.
        """
        if self._state == "scalar":
            if self._goes_on(char):
                return True
            self._end_value()
            if self.done:
                return False
        if self._state in ("string", "escape", "hex"):
            self._in_string(char)
        elif char not in BLANK:
            self._between(char)
        return True

    def _goes_on(self, char: str) -> bool:
        if char in _SCALAR_CHARACTERS:
            self._scalar += char
            if len(self._scalar) > _LONGEST_SCALAR:
                raise Malformed
            if not _SCALAR.fullmatch(self._scalar, partial=True):
                raise Malformed
            return True
        if not _SCALAR.fullmatch(self._scalar):
            raise Malformed
        return False

    def _in_string(self, char: str) -> None:
        if self._state == "escape":
            if char not in '"\\/bfnrtu':
                raise Malformed
            self._hex_digits = 4
            self._state = "hex" if char == "u" else "string"
        elif self._state == "hex":
            if char not in _HEX:
                raise Malformed
            self._hex_digits -= 1
            if not self._hex_digits:
                self._state = "string"
        elif char == "\\":
            self._state = "escape"
        elif char < " ":
            raise Malformed
        elif char == '"':
            if self._is_key:
                self._state = "colon"
            else:
                self._end_value()

    def _between(self, char: str) -> None:
        state = self._state
        if state == "next" and char == ",":
            self._state = "key" if self._open[-1] == "}" else "value"
        elif state in ("next", "first key", "first value") and char == self._open[-1]:
            self._open.pop()
            self._end_value()
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state in ("key", "first key") and char == '"':
            self._state, self._is_key = "string", True
        elif state in ("value", "first value"):
            self._begin(char)
        else:
            raise Malformed

    def _begin(self, char: str) -> None:
        if char == '"':
            self._state, self._is_key = "string", False
        elif char == "{":
            self._open.append("}")
            self._state = "first key"
        elif char == "[":
            self._open.append("]")
            self._state = "first value"
        elif char in "-0123456789tfn":
            self._state, self._scalar = "scalar", char
        else:
            raise Malformed

    def _end_value(self) -> None:
        self._state = "next"
        self.done = not self._open
