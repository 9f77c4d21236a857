# SPDX-License-Identifier: Apache-2.0
"""Tool calls and reasoning through a real vLLM server and the openai client.

The shipped model was trained on novels and calls nothing. Where the model may choose, a regular
expression forces the text of a call on it; a required call is forced by what the parser asks for.
There blank tokens are out and the end of the list is favoured: JSON may have as many blanks and
calls as it likes, and this model would not stop making them.
"""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from _server import Server

from .engines import METHOD

pytestmark = [pytest.mark.compat, pytest.mark.slow]

NAME = "nanoquant_nemotron_v2"
TEMPLATE = Path(__file__).with_name("nemotron_v2.jinja")
CITY = {"type": "string", "enum": ["Bath", "York"]}
DEFINED = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": CITY},
}
FLAT = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
        "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}
    for name, parameters in (("weather", DEFINED), ("count", FLAT))
]
CALL = '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Bath", "days": [1, {"a": "}]"}]}}'
CALLS = CALL + ', {"name": "count", "arguments": {"x": 2}}]</TOOLCALL>'
ARGUMENTS = [("weather", '{"city": "Bath", "days": [1, {"a": "}]"}]}'), ("count", '{"x": 2}')]


# The shipped tokenizer's "]", and a tab, line ends and a space.
BIAS = {"63": 100, **dict.fromkeys(["200", "201", "203", "223"], -100)}


@pytest.fixture(scope="module")
def client(tiny_model, tmp_path_factory):
    from openai import DefaultHttpxClient, OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--model", str(tiny_model), "--port", str(port), "--host", "127.0.0.1"]
    arguments += ["--served-model-name", "tiny", "--max-model-len", "1024", "--max-num-seqs", "4"]
    arguments += ["--quantization", METHOD, "--enforce-eager", "--chat-template", str(TEMPLATE)]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", NAME]
    # The model never closes its reasoning, so what is forced must hold within it, too.
    arguments += ["--reasoning-parser", NAME, "--structured-outputs-config.enable_in_reasoning"]
    arguments += ["true", "--no-enable-prefix-caching"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("tools") / "server.log"
    with Server(command, log, f"{url}/health") as server:
        server.wait("starting vLLM", 300)
        http = DefaultHttpxClient(trust_env=False)
        with OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
            yield client


def ask(client, forced=None, thinks=False, tools=TOOLS, stream=False, **rest):
    """What came: calls as (name, arguments), content, reasoning, finish_reason."""
    switch = "/think" if thinks else "/no_think"
    if forced is not None:
        rest["extra_body"] = {"structured_outputs": {"regex": re.escape(forced)}}
    if tools:
        rest["tools"] = tools
    rest = {"max_tokens": 300, "temperature": 0, **rest}
    if forced is None:
        rest["logit_bias"] = BIAS
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": f"How is the weather? {switch}"}],
        stream=stream,
        **rest,
    )
    return gathered(answer) if stream else plain(answer.choices[0])


def plain(choice):
    message = choice.message
    calls = message.tool_calls or []
    assert all(call.type == "function" and call.id for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    found = [(call.function.name, call.function.arguments) for call in calls]
    reasoning = getattr(message, "reasoning", None)
    return found, message.content or "", reasoning or "", choice.finish_reason


def gathered(stream):
    calls, content, reasoning, finish = {}, "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            finish = choice.finish_reason or finish
            for part in choice.delta.tool_calls or []:
                if part.index not in calls:
                    assert part.id and part.type == "function" and part.function.name
                    calls[part.index] = [part.function.name, ""]
                else:
                    assert part.id is None and part.function.name is None
                calls[part.index][1] += part.function.arguments or ""
    assert sorted(calls) == list(range(len(calls)))
    return [tuple(call) for call in calls.values()], content, reasoning, finish


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request):
    return request.param


def test_the_model_may_call(client, stream):
    assert ask(client, CALLS, stream=stream) == (ARGUMENTS, "", "", "tool_calls")
    around = ask(client, "Wait.\n" + CALLS + "\nDone <", tool_choice="auto", stream=stream)
    assert around == (ARGUMENTS, "Wait.\n\nDone <", "", "tool_calls")


def test_it_may_think_before_it_calls(client, stream):
    text = "Hm, <TOOLCALL>[ or not?\n</think>\n\n" + CALLS
    calls, content, reasoning, finish = ask(client, text, thinks=True, stream=stream)
    assert (calls, content) == (ARGUMENTS, "")
    assert (reasoning, finish) == ("Hm, <TOOLCALL>[ or not?\n", "tool_calls")


def test_it_may_think_and_answer(client, stream):
    text = "Hm, <\n</think>\nFine."
    assert ask(client, text, thinks=True, stream=stream) == ([], "\nFine.", "Hm, <\n", "stop")
    without_tools = ask(client, text, thinks=True, tools=None, stream=stream)
    assert without_tools == ([], "\nFine.", "Hm, <\n", "stop")
    assert ask(client, "Fine. <think>", stream=stream) == ([], "Fine. <think>", "", "stop")


def test_thinking_that_never_ends_is_all_reasoning(client, stream):
    text = "Hm, and hm, <TOOLCALL>"
    assert ask(client, text, thinks=True, stream=stream) == ([], "", text, "stop")


def test_a_faulty_call_is_content(client, stream):
    text = "So: <TOOLCALL>[{'name': 'weather'}]</TOOLCALL>"
    assert ask(client, text, stream=stream) == ([], text, "", "stop")


def test_a_truncated_call(client):
    calls, content, _, finish = ask(client, CALLS, max_tokens=30)
    assert (calls, finish) == ([], "length")
    assert content == CALLS[: len(content)] and content
    calls, content, _, finish = ask(client, CALLS, max_tokens=30, stream=True)
    assert finish in ("length", "tool_calls")
    assert content + "".join(arguments for _, arguments in calls)


def test_a_call_can_be_required(client, stream):
    calls, content, _, _ = ask(client, tool_choice="required", stream=stream)
    assert calls and content == ""
    assert len(calls) == 1
    for name, arguments in calls:
        read = json.loads(arguments)
        assert read["city"] in CITY["enum"] if name == "weather" else read["x"] in (1, 2)


@pytest.mark.parametrize("name", ["weather", "count"])
def test_a_function_can_be_named(client, stream, name):
    choice = {"type": "function", "function": {"name": name}}
    calls, content, _, _ = ask(client, tool_choice=choice, stream=stream)
    assert [called for called, _ in calls] == [name]
    assert content == ""
    key = "city" if name == "weather" else "x"
    assert set(json.loads(calls[0][1])) == {key}


def test_one_call_at_most_where_the_client_says_so(client):
    calls, _, _, _ = ask(client, tool_choice="required", parallel_tool_calls=False)
    assert len(calls) == 1


def test_calls_can_be_ruled_out(client, stream):
    assert ask(client, CALLS, tool_choice="none", stream=stream) == ([], CALLS, "", "stop")
    assert ask(client, CALLS, tools=None, stream=stream) == ([], CALLS, "", "stop")
