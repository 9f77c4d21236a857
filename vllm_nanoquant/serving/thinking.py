# SPDX-License-Identifier: Apache-2.0
"""Nemotron Nano v2's reasoning, read as the text arrives. No vLLM here.

The chat template ends the prompt with ``<think>`` and a line end, so that the answer begins inside
the reasoning and closes it with ``</think>``; or, where thinking is off, with ``<think></think>``.
"""

from collections.abc import Iterable
from typing import Any

from vllm_nanoquant.serving.toolcall import possible_tag

__all__ = ["CLOSE", "OPEN", "ThinkingScanner", "asks_to_think", "opens_thinking"]

OPEN, CLOSE = "<think>", "</think>"


class ThinkingScanner:
    """Splits an answer that begins inside reasoning; an opening tag at its beginning is dropped.

    Attributes:
        ended: the closing tag was there.
    """

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._begun = False

    def feed(self, text: str) -> tuple[str, str]:
        """The next piece of text, as reasoning and content; either may be empty."""
        if self.ended:
            return "", text
        text, self._text = self._text + text, ""
        if not self._begun:
            start = text.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                self._text = text
                return "", ""
            self._begun = True
            text = start.removeprefix(OPEN) if start.startswith(OPEN) else text
        reasoning, tag, content = text.partition(CLOSE)
        self.ended = bool(tag)
        certain = len(reasoning) - (0 if tag else possible_tag(reasoning, CLOSE))
        self._text = reasoning[certain:]
        return reasoning[:certain], content

    def finish(self) -> str:
        """Reasoning that was held back because a tag might have begun with it."""
        text, self._text = self._text, ""
        return text


def opens_thinking(prompt: str) -> bool | None:
    """Whether a prompt, or the end of one, leaves reasoning open; None where it has no tag."""
    opened, closed = prompt.rfind(OPEN), prompt.rfind(CLOSE)
    return None if opened == closed else opened > closed


def asks_to_think(request: Any) -> bool:
    """Whether the template would turn thinking on: the last ``/think`` or ``/no_think`` decides.

    Args:
        request: of the chat or the Responses API; its messages of the system and the user count.
    """
    thinks = True
    for message in _messages(request):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user"):
            continue
        content = message.get("content") or ""
        if not isinstance(content, str):
            parts = [part for part in content if isinstance(part, dict)]
            content = "\n".join(str(part.get("text") or "") for part in parts)
        if "/think" in content.replace(CLOSE, ""):
            thinks = True
        elif "/no_think" in content:
            thinks = False
    return thinks


def _messages(request: Any) -> Iterable[Any]:
    messages = getattr(request, "messages", None)
    if messages is not None:
        return list(messages)
    given = getattr(request, "input", None) or []
    system = {"role": "system", "content": getattr(request, "instructions", None)}
    return [system, *([{"role": "user", "content": given}] if isinstance(given, str) else given)]
