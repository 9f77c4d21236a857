# SPDX-License-Identifier: Apache-2.0
"""vLLM's tool parser for Nemotron Nano v2: ``--tool-call-parser nanoquant_nemotron_v2``."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.abstract_tool_parser import ToolParser

from vllm_nanoquant.compat import chat_protocol
from vllm_nanoquant.serving.call_schema import forced_calls
from vllm_nanoquant.serving.toolcall import (
    Broken,
    CallBegin,
    Content,
    Event,
    ToolCallScanner,
    parse_tool_calls,
)

__all__ = ["NemotronV2ToolParser"]


class NemotronV2ToolParser(ToolParser):
    """``<TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>``, and text around it.

    One instance reads one message. Arguments are passed on as the model wrote them.
    """

    # What vLLM asks of such parsers is what reading text needs: it hands over each piece once, and
    # calls finish_streaming() at the end, where text that might have become a tag comes out.
    engine_based_streaming = True
    # A required call is made in the model's own form, not in vLLM's list of "parameters".
    supports_required_and_named = False

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._scanner = ToolCallScanner()
        self._protocol = chat_protocol()

    def adjust_request(self, request: Any) -> Any:
        """Keep the tags in the text, and force a call where ``tool_choice`` demands one."""
        if not _takes_calls(request):
            return request
        request.skip_special_tokens = False
        given = getattr(request, "structured_outputs", None)
        if given is not None and given.structural_tag is not None:
            return request
        forced = forced_calls(request.tools, request.tool_choice, request.parallel_tool_calls)
        if forced is not None:
            request.structured_outputs = StructuredOutputsParams(structural_tag=json.dumps(forced))
            # A format of the answer cannot hold besides; vLLM prefers the forced call, too.
            if hasattr(request, "response_format"):
                request.response_format = None
            else:  # the Responses API
                request.text = None
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> Any:
        """Read a whole message: vLLM's ``ExtractedToolCallInformation``."""
        protocol = self._protocol
        calls, content = parse_tool_calls(model_output) if _takes_calls(request) else ([], "")
        return protocol.ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[
                protocol.ToolCall(
                    id=_call_id(),
                    function=protocol.FunctionCall(name=call.name, arguments=call.arguments),
                )
                for call in calls
            ],
            content=(content or None) if calls else model_output,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> Any:
        """Read the next piece of a message: vLLM's ``DeltaMessage``, or None for nothing yet."""
        if not _takes_calls(request):
            return self._protocol.DeltaMessage(content=delta_text) if delta_text else None
        return self._message(self._scanner.feed(delta_text))

    def finish_streaming(self) -> Any:
        """What was held back until the end of the message, as a ``DeltaMessage`` or None."""
        return self._message(self._scanner.finish())

    def _message(self, events: list[Event]) -> Any:
        protocol = self._protocol
        content = ""
        calls: dict[int, Any] = {}
        for event in events:
            if isinstance(event, Content | Broken):
                content += event.text if isinstance(event, Content) else event.unsent
                continue
            call = calls.setdefault(
                event.index,
                protocol.DeltaToolCall(
                    index=event.index, function=protocol.DeltaFunctionCall(arguments="")
                ),
            )
            if isinstance(event, CallBegin):
                call.id, call.type, call.function.name = _call_id(), "function", event.name
            else:
                call.function.arguments += event.text
        if not content and not calls:
            return None
        return protocol.DeltaMessage(content=content or None, tool_calls=list(calls.values()))


def _takes_calls(request: Any) -> bool:
    return bool(request.tools) and request.tool_choice != "none"


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex}"
