# SPDX-License-Identifier: Apache-2.0
"""vLLM's reasoning parser for Nemotron Nano v2: ``--reasoning-parser nanoquant_nemotron_v2``."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

from vllm_nanoquant.compat import chat_protocol
from vllm_nanoquant.serving.thinking import (
    CLOSE,
    OPEN,
    ThinkingScanner,
    asks_to_think,
    opens_thinking,
)

__all__ = ["NemotronV2ReasoningParser"]

_WINDOW = 64  # tokens of the end of a prompt that are read first


class NemotronV2ReasoningParser(ReasoningParser):
    """Reasoning up to ``</think>``, where the prompt has opened it with ``<think>``.

    Tags are looked for in the text, so the tokenizer may split them in any way. One instance reads
    one message.
    """

    # As in tool_parser.py: pieces of text once each, and finish_streaming() at the end.
    engine_based_streaming = True

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._template_options = kwargs.get("chat_template_kwargs") or {}
        self._scanner = ThinkingScanner()
        self._opened: bool | None = None  # by the prompt; None until vLLM has shown it
        self._protocol = chat_protocol()

    @property
    def reasoning_start_str(self) -> str:
        """The opening tag."""
        return OPEN

    @property
    def reasoning_end_str(self) -> str:
        """The closing tag."""
        return CLOSE

    def adjust_request(self, request: Any) -> Any:
        """Keep the tags in the text, should they be special tokens."""
        request.skip_special_tokens = False
        return request

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether no reasoning is open at the end of these tokens, which begin with the prompt.

        vLLM asks this of the prompt first, in every release, and tells the prompt in no other way
        before 0.33: so it is noted here.
        """
        ended = not self._opens(input_ids)
        if self._opened is None and input_ids:
            self._opened = not ended
        return ended

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """Take the prompt (vLLM 0.33)."""
        self._opened = self._opens(prompt_token_ids)

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        """Whether the last tokens, `delta_ids`, close the reasoning."""
        tokens = len(list(delta_ids)) + 2 * len(CLOSE)
        return opens_thinking(self._decode(input_ids[-tokens:])) is False

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens behind the closing tag; none if there is no such tag."""
        return input_ids[self._tokens_with(input_ids, CLOSE) :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of an answer before its closing tag, a tag's own tokens not counted."""
        if self._opened is False:
            return 0
        end = self._tokens_with(token_ids, CLOSE)
        if CLOSE not in self._decode(token_ids[:end]):
            return end
        text = self._decode(token_ids[:end]).partition(CLOSE)[0]
        return bisect_left(
            range(end), True, key=lambda count: len(self._decode(token_ids[:count])) >= len(text)
        )

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Split a whole answer into reasoning and content; None stands for none."""
        if not self._is_open(request):
            return None, model_output or None
        scanner = ThinkingScanner()
        reasoning, content = scanner.feed(model_output)
        return reasoning + scanner.finish() or None, content or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> Any:
        """Split the next piece of an answer: vLLM's ``DeltaMessage``, or None for nothing yet."""
        return self._message(*self._scanner.feed(delta_text))

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Whether the closing tag was in the text so far."""
        return self._scanner.ended

    def finish_streaming(self) -> Any:
        """What was held back until the end of the reasoning, as a ``DeltaMessage`` or None."""
        return self._message(self._scanner.finish(), "")

    def _message(self, reasoning: str, content: str) -> Any:
        if not reasoning and not content:
            return None
        return self._protocol.DeltaMessage(reasoning=reasoning or None, content=content or None)

    def _is_open(self, request: Any) -> bool:
        if self._opened is not None:
            return self._opened
        if self._template_options.get("enable_thinking") is False:
            return False
        return asks_to_think(request)

    def _opens(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt leaves reasoning open; one without any tag does not."""
        window = _WINDOW
        while True:
            found = opens_thinking(self._decode(prompt_ids[-window:]))
            if found is not None or window >= len(prompt_ids):
                return bool(found)
            window *= 8

    def _tokens_with(self, token_ids: Sequence[int], tag: str) -> int:
        """How many tokens it takes until the text has the tag; all of them where it has not."""
        return bisect_left(
            range(len(token_ids)), True, key=lambda count: tag in self._decode(token_ids[:count])
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.model_tokenizer.decode(list(token_ids), skip_special_tokens=False))
