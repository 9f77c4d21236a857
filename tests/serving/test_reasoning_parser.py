# SPDX-License-Identifier: Apache-2.0
"""Both parsers as vLLM drives them: its own code around ours, on a real tokenizer, no engine."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_nanoquant.serving.thinking import (
    CLOSE,
    OPEN,
    ThinkingScanner,
    asks_to_think,
    opens_thinking,
)

pytestmark = pytest.mark.compat

NAME = "nanoquant_nemotron_v2"
TEXT = st.lists(st.sampled_from(["<", "</", "</thin", "<think", "a", "\n", "é€"])).map("".join)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = '<TOOLCALL>[{"name": "f", "arguments": {"a": [1, {"b": "é"}]}}, {"name": "g"}]</TOOLCALL>'
PARSED = [("f", '{"a": [1, {"b": "é"}]}'), ("g", "{}")]
OPENED, CLOSED = "user: hm\nassistant: <think>\n", "user: hm\nassistant: <think></think>"


def in_pieces(pieces):
    scanner, reasoning, content = ThinkingScanner(), "", ""
    for piece in pieces:
        more, answer = scanner.feed(piece)
        reasoning, content = reasoning + more, content + answer
    return reasoning + scanner.finish(), content


@settings(deadline=None)
@given(TEXT, TEXT, st.sampled_from(["", OPEN, "\n" + OPEN]))
def test_an_answer_is_split_however_it_is_cut(thought, answer, opening):
    plain = thought.lstrip().startswith(OPEN[:1]) and not opening
    text = opening + thought + CLOSE + answer
    if not plain:
        assert in_pieces([text]) == (thought, answer)
    expected = in_pieces([text])
    assert in_pieces(text) == expected
    for place in range(len(text) + 1):
        assert in_pieces([text[:place], text[place:]]) == expected
    assert in_pieces(opening + thought) == in_pieces([opening + thought])
    if opening:
        assert in_pieces([opening + thought]) == (thought, "")


@settings(deadline=None)
@given(st.text())
def test_any_text_is_split_without_loss(text):
    reasoning, content = in_pieces(text)
    assert (reasoning, content) == in_pieces([text])
    if CLOSE not in text and not text.lstrip().startswith(OPEN):
        assert (reasoning, content) == (text, "")


def test_the_last_tag_of_a_prompt_decides():
    assert opens_thinking(OPENED) is True
    assert opens_thinking(CLOSED) is False
    assert opens_thinking(CLOSED + "hi" + OPENED) is True
    assert opens_thinking("user: hm") is None


@pytest.mark.parametrize(
    ("contents", "thinks"),
    [
        ([], True),
        (["hi"], True),
        (["/no_think"], False),
        (["/no_think", "hi"], False),
        (["/no_think", "hi /think"], True),
        (["/think", "hi /no_think"], False),
        (["/think and /no_think"], True),
        (["a </think> b /no_think"], False),
        ([[{"type": "text", "text": "/no_think"}, {"type": "image_url"}]], False),
        ([None], True),
    ],
)
def test_switches_in_messages(contents, thinks):
    messages = [{"role": "user", "content": content} for content in contents]
    ignored = [{"role": "assistant", "content": "/no_think"}, "no message", {"role": "user"}]
    assert asks_to_think(SimpleNamespace(messages=[*messages, *ignored])) is thinks
    assert asks_to_think(SimpleNamespace(input=[*messages, *ignored])) is thinks


def test_switches_in_a_request_of_the_responses_api():
    assert asks_to_think(SimpleNamespace(input="hi"))
    assert not asks_to_think(SimpleNamespace(input="hi /no_think", instructions="/think"))
    assert not asks_to_think(SimpleNamespace(input="hi", instructions="/no_think"))
    assert asks_to_think(SimpleNamespace(input=None, instructions=None))


@pytest.fixture(scope="module")
def vllm_parsers(tiny_model):
    """Makes vLLM's own pair of our parsers, as its server does for each request."""
    from transformers import AutoTokenizer
    from vllm.parser.parser_manager import ParserManager

    from vllm_nanoquant.plugin import register

    register()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(tools=NAME, reasoning=NAME):
        parser = ParserManager.get_parser(
            tool_parser_name=tools, reasoning_parser_name=reasoning, enable_auto_tools=True
        )
        return parser(tokenizer, [])

    make.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    make.decode = tokenizer.decode
    return make


def request(**rest):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    rest = {"tools": TOOLS, "tool_choice": "auto", **rest}
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hm"}], **rest)


def streamed(parser, prompt_ids, pieces, asked):
    """Reasoning, content and calls that a client would put together; pieces are (text, ids)."""
    reasoning, content, calls = "", "", {}
    for place, (text, ids) in enumerate(pieces):
        delta = parser.parse_delta(
            text, ids, asked, prompt_token_ids=prompt_ids, finished=place == len(pieces) - 1
        )
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for part in delta.tool_calls:
            if part.id:
                assert part.index == len(calls)
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments or ""
    return reasoning, content, [tuple(call) for call in calls.values()]


MESSAGES = [
    ("Hm <TOOLCALL>[\n</think>\nNow." + CALLS + "\n<", ("Hm <TOOLCALL>[\n", "\nNow.\n<", PARSED)),
    ("Hm</think>" + CALLS, ("Hm", "", PARSED)),
    ("</think>Fine </th", ("", "Fine </th", [])),
    ("Hm, and hm </thi", ("Hm, and hm </thi", "", [])),
    ("<think>Hm</think>Fine", ("Hm", "Fine", [])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MESSAGES)
def test_vllm_puts_both_together(vllm_parsers, text, expected):
    prompt, ids = vllm_parsers.encode(OPENED), vllm_parsers.encode(text)
    parser = vllm_parsers()
    assert parser.is_reasoning_end(prompt) is False
    reasoning, content, calls = parser.parse(text, request(), enable_auto_tools=True)
    found = [(call.name, call.arguments) for call in calls or []]
    assert (reasoning or "", content or "", found) == expected
    # Token by token: a character of several tokens comes with its last one.
    pieces, shown = [], ""
    for count in range(1, len(ids) + 1):
        now = vllm_parsers.decode(ids[:count])
        if not now.endswith("\ufffd"):
            pieces.append((now[len(shown) :], [ids[count - 1]]))
            shown = now
    assert shown == text
    assert streamed(vllm_parsers(), prompt, pieces, request()) == expected
    for place in range(len(text) + 1):
        halves = [(half, vllm_parsers.encode(half)) for half in (text[:place], text[place:])]
        assert streamed(vllm_parsers(), prompt, halves, request()) == expected


FRAGMENTS = [CALLS, OPEN, CLOSE, "hm", "<TOOLCALL>[", "\n", "é"]


@settings(max_examples=30, deadline=None)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS)).map("".join),
    prompt=st.sampled_from([OPENED, CLOSED, "hm"]),
)
def test_whatever_the_text_both_ways_agree(vllm_parsers, text, prompt):
    prompt_ids = vllm_parsers.encode(prompt)
    parser = vllm_parsers()
    parser.is_reasoning_end(prompt_ids)
    reasoning, content, calls = parser.parse(text, request(), enable_auto_tools=True)
    pieces = [(char, [7]) for char in text] + [("", [])]
    in_all = streamed(vllm_parsers(), prompt_ids, pieces, request())
    found = [(call.name, call.arguments) for call in calls or []]
    assert (reasoning or "", content or "", found) == in_all


def test_without_thinking_all_is_content(vllm_parsers):
    for prompt in (CLOSED, "no tag at all", CLOSED + "answer " * 300):
        ids = vllm_parsers.encode(prompt)
        parser = vllm_parsers()
        assert parser.is_reasoning_end(ids) is True
        assert parser.parse("Fine </think>.", request())[:2] == (None, "Fine </think>.")
        pieces = [("Fine </th", [7]), ("ink>.", [7])]
        assert streamed(vllm_parsers(), ids, pieces, request()) == ("", "Fine </think>.", [])
    assert not vllm_parsers().is_reasoning_end(vllm_parsers.encode(OPENED + "so " * 300))


def test_each_parser_works_alone(vllm_parsers):
    ids = vllm_parsers.encode(OPENED)
    pieces = [(char, [7]) for char in "Hm</think>" + CALLS + "<"]
    only_thinks = streamed(vllm_parsers(tools=None), ids, pieces, request())
    assert only_thinks == ("Hm", CALLS + "<", [])
    only_calls = streamed(vllm_parsers(reasoning=None), ids, pieces, request())
    assert only_calls == ("", "Hm</think><", PARSED)


def test_beside_vllms_own_parsers(vllm_parsers):
    ids = vllm_parsers.encode(OPENED)
    hermes = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    pieces = [("Hm</thi", [7]), ("nk>", [7]), ("Now. ", [7]), (hermes, [7, 7]), ("", [])]
    reasoning, content, calls = streamed(vllm_parsers(tools="hermes"), ids, pieces, request())
    assert (reasoning, content.strip()) == ("Hm", "Now.")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"a": 1})]


def test_before_the_prompt_is_known_the_messages_decide(vllm_parsers):
    reasoner = vllm_parsers().reasoning_parser
    assert reasoner.extract_reasoning("Hm</think>Yes", request()) == ("Hm", "Yes")
    quiet = request()
    quiet.messages = [{"role": "user", "content": "/no_think"}]
    assert reasoner.extract_reasoning("Yes", quiet) == (None, "Yes")
    reasoner.set_prompt_token_ids(vllm_parsers.encode(CLOSED))
    assert reasoner.extract_reasoning("Yes", request()) == (None, "Yes")


def test_the_engine_sees_the_end_in_the_tokens(vllm_parsers):
    reasoner = vllm_parsers().reasoning_parser
    prompt = vllm_parsers.encode(CLOSED + " earlier\n" + OPENED)
    thought = vllm_parsers.encode("Hm, é and </thinking, but " * 20 + CLOSE)
    ended = [
        reasoner.is_reasoning_end_streaming(prompt + thought[:count], [thought[count - 1]])
        for count in range(1, len(thought) + 1)
    ]
    assert ended == [False] * (len(thought) - 1) + [True]
    answer = vllm_parsers.encode("Fine.")
    assert reasoner.is_reasoning_end_streaming(prompt + thought + answer, thought[-9:] + answer)
    assert reasoner.extract_content_ids(thought + answer) == answer
    assert reasoner.extract_content_ids(answer) == []
    tag = vllm_parsers.encode(CLOSE)
    assert len(tag) > 1, "the shipped tokenizer splits the tag, which is what is tested here"
    counted = reasoner.count_reasoning_tokens(thought + answer)
    assert abs(counted - (len(thought) - len(tag))) <= 1
    assert reasoner.count_reasoning_tokens(answer) == len(answer)
    assert reasoner.is_reasoning_end(vllm_parsers.encode(CLOSED))
    assert reasoner.count_reasoning_tokens(answer) == 0


def test_forced_calls_are_read_in_the_models_own_form(vllm_parsers):
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        asked = request(tool_choice=choice)
        _, content, calls = vllm_parsers(reasoning=None).parse(CALLS, asked, enable_auto_tools=True)
        assert (content, [(call.name, call.arguments) for call in calls]) == (None, PARSED)
        pieces = [(char, [7]) for char in CALLS]
        assert streamed(vllm_parsers(reasoning=None), [7], pieces, asked) == ("", "", PARSED)


def forced(vllm_parsers, **rest):
    asked = vllm_parsers().adjust_request(request(**rest))
    assert asked.skip_special_tokens is False
    given = asked.structured_outputs
    return asked, None if given is None else json.loads(given.structural_tag)


def test_required_calls_are_forced_in_the_models_own_form(vllm_parsers):
    import xgrammar

    asked, tag = forced(vllm_parsers, tool_choice="required", response_format={"type": "text"})
    assert asked.response_format is None
    xgrammar.Grammar.from_structural_tag(json.dumps(tag))
    assert tag["format"]["begin"] == "<TOOLCALL>"
    assert tag["format"]["end"] == "</TOOLCALL>"
    schema = tag["format"]["content"]["json_schema"]
    assert "maxItems" not in schema
    assert forced(vllm_parsers, tool_choice="auto")[1] is None
    assert forced(vllm_parsers, tool_choice="none")[1] is None
    named = {"type": "function", "function": {"name": "f"}}
    for one in ({"tool_choice": named}, {"tool_choice": "required", "parallel_tool_calls": False}):
        assert forced(vllm_parsers, **one)[1]["format"]["content"]["json_schema"]["maxItems"] == 1


def test_references_of_a_schema_stay_within_it():
    from vllm_nanoquant.serving.call_schema import forced_calls

    parameters = {
        "properties": {"$ref": {"$ref": "#/$defs/x"}, "me": {"$ref": "#"}},
        "anyOf": [{"$ref": "https://elsewhere#/x"}],
        "$defs": {"x": {"type": "string"}},
    }
    tools = [SimpleNamespace(name=name, parameters=parameters) for name in ("f", "g")]
    schema = forced_calls(tools, "required")["format"]["content"]["json_schema"]
    moved = schema["$defs"]["arguments1"]
    assert moved["properties"]["$ref"] == {"$ref": "#/$defs/arguments1/$defs/x"}
    assert moved["properties"]["me"] == {"$ref": "#/$defs/arguments1"}
    assert moved["anyOf"] == parameters["anyOf"]
    assert forced_calls([SimpleNamespace(type="web_search")], "required") is None
    assert forced_calls(tools, SimpleNamespace(name="absent")) is None
