# SPDX-License-Identifier: Apache-2.0
"""Tool calls in a message's text, whole and in pieces, without vLLM."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_nanoquant.serving.json_value import JsonValue, Malformed
from vllm_nanoquant.serving.toolcall import (
    CLOSE,
    OPEN,
    Arguments,
    Broken,
    CallBegin,
    Content,
    ToolCallScanner,
    parse_tool_calls,
    possible_tag,
)

# A busy machine may be slow.
ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.text(min_size=1, max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    SCALARS.filter(lambda x: x not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
# Text that looks like a tag often enough; without whole opening tags, which begin a block.
TEXT = (
    st.lists(
        st.sampled_from(["<", "<TOOL", OPEN[:-1], CLOSE, "\n", " ", "a", "é€", "[{", "</think>"])
        | st.text(max_size=3)
    )
    .map("".join)
    .filter(lambda text: OPEN not in text)
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")])
FRAGMENTS = [OPEN, CLOSE, *"[]{}:,\"\\\n-0'", '"name"', '"arguments"', '"f"', "{}", "1e", "tru"]
FRAGMENTS += ["\\u12", '[{"name": "f", "arguments": {', "null"]
JUNK = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=2), max_size=25).map("".join)


def block(calls, separators=(", ", ": "), ascii_only=False):
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return OPEN + json.dumps(listed, separators=separators, ensure_ascii=ascii_only) + CLOSE


def streamed(pieces):
    """Calls as [name, text of arguments], content, and the events, of a message in pieces."""
    scanner, calls, content, seen = ToolCallScanner(), {}, "", []
    events = [event for piece in pieces for event in scanner.feed(piece)]
    for event in events + scanner.finish():
        seen.append(event)
        if isinstance(event, CallBegin):
            assert event.index == len(calls)
            calls[event.index] = [event.name, ""]
        elif isinstance(event, Arguments):
            assert event.index == len(calls) - 1
            assert event.text
            calls[event.index][1] += event.text
        else:
            content += event.text if isinstance(event, Content) else event.unsent
    assert scanner.finish() == []
    return list(calls.values()), content, seen


def whole(text):
    calls, content = parse_tool_calls(text)
    return [[call.name, call.arguments] for call in calls], content


@ANY_SPEED
@given(TEXT, CALLS, TEXT, SEPARATORS, st.booleans())
def test_calls_and_the_text_around_them(before, calls, after, separators, ascii_only):
    found, content = whole(before + block(calls, separators, ascii_only) + after)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    around = before + after
    assert content == (around if around.strip() else "")


@ANY_SPEED
@given(TEXT, CALLS, TEXT, CALLS, st.data())
def test_pieces_are_as_good_as_the_whole(before, calls, between, more, data):
    text = before + block(calls) + between + block(more) + before
    expected = whole(text)
    assert len(expected[0]) == len(calls) + len(more)
    assert streamed(text)[:2] == expected
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(pieces)[:2] == expected


MESSAGES = [
    "Let me see.\n\n"
    + block(
        [("weather", {"city": 'Z\u00fcrich "\\n', "days": [1, -2.5e3, {"a": None}]}), ("g", {})]
    )
    + "\nDone <",
    "  \n" + block([("f", {"x": "</TOOLCALL><TOOLCALL>[{"})]) + "\n" + block([("f", {"y": {}})]),
    OPEN
    + ' [ { "arguments" : {"deep": [[[{}]]]} , "id": 7, "name" : "f" } , {"name":"g"} ] '
    + CLOSE,
    "no calls <TOOLCALL, and < at the end <TOOLCAL",
    "",
    " \n",
]


@pytest.mark.parametrize("text", MESSAGES)
def test_every_way_to_cut_a_message_in_two(text):
    expected = whole(text)
    assert streamed(text)[:2] == expected
    for place in range(len(text) + 1):
        assert streamed([text[:place], text[place:]])[:2] == expected


def test_what_these_messages_say():
    results = [whole(text) for text in MESSAGES]
    assert [[name for name, _ in calls] for calls, _ in results] == [
        ["weather", "g"], ["f", "f"], ["f", "g"], [], [], []
    ]  # fmt: skip
    assert results[0][1] == "Let me see.\n\n\nDone <"
    assert json.loads(results[0][0][0][1])["city"] == 'Zürich "\\n'
    assert [content for _, content in results[1:]] == ["", "", MESSAGES[3], "", " \n"]
    assert results[2][0] == [["f", '{"deep": [[[{}]]]}'], ["g", "{}"]]


@settings(ANY_SPEED, max_examples=400)
@given(JUNK, st.data())
@example(OPEN + '[{"name": "f", "arguments": {}}, {"arguments": {"a": 1}, "name": ""}]', None)
def test_no_text_raises_and_none_is_lost(text, data):
    calls, content = whole(text)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)
    if not calls:
        assert content == text
    cut = data.draw(st.integers(0, len(text))) if data else 3
    in_two, one_by_one = streamed([text[:cut], text[cut:]]), streamed(text)
    assert in_two[:2] == one_by_one[:2]
    broken = [event for event in one_by_one[2] if isinstance(event, Broken)]
    if not any(event.calls for event in broken):
        assert one_by_one[:2] == (calls, content)


ONE = '[{"name": "f", "arguments": {"a": 1}}]'
FAULTY = [
    "[]", "{}", "", "[1]", "[{}]", "null", '[{"name": "f", "arguments": {}},]', '[{"name": ""}]',
    '[{"name": "f", "arguments": "{}"}]', '[{"name": "f", "arguments": [1]}]', '["f"]',
    '[{"arguments": {}}]', '[{"name": "f", "name": "g"}]', "[{'name': 'f', 'arguments': {}}]",
    '[{"name": "f", "arguments": {"a": 01}}]', '[{"name": "f", "arguments": {"a": NaN}}]',
    '[{"name": "f", "arguments": {"a": "line\nend"}}]', '[{"name": "f", "arguments": {"a" 1}}]',
    '[{"name": "\\ud800", "arguments": {}}]', '[{"name": "f", "arguments": {"a": [1}}]',
    '[{"name": 5, "arguments": {}}]', '[{"name": "f", "arguments": {"a": "\\x"}}]',
    '[{"name": "f", "arguments": {}, "arguments": {}}]', '[{"name": "f"} {"name": "g"}]',
    '[{"name": "f", "arguments": {"a": [1}}}]', '[{"name": "f", "arguments": {"a" "b": 1}}]',
    '[{"name": "f", "arguments": {"n": ' + "1" * 5000 + "}}]",
]  # fmt: skip


@pytest.mark.parametrize("inside", FAULTY)
def test_a_faulty_block_is_content_to_the_last_character(inside):
    text = f"Look: {OPEN}{inside}{CLOSE} and more"
    assert whole(text) == ([], text)
    # The next block is read all the same.
    assert whole(text + OPEN + ONE + CLOSE) == ([["f", '{"a": 1}']], text)


@pytest.mark.parametrize("length", range(len(OPEN + ONE)))
def test_a_truncated_block_is_content(length):
    text = "Look: " + (OPEN + ONE)[:length]
    assert whole(text) == ([], text)
    calls, content, _ = streamed(text)
    if not calls:
        assert content == text
    else:  # already sent: the call as far as it came
        assert calls[0][0] == "f"
        assert '{"a": 1}'.startswith(calls[0][1]) and calls[0][1]
        assert content in ("Look: ", "Look: }")


@pytest.mark.parametrize("tail", ["", " ", "</", "\n</TOOLCALL", CLOSE])
def test_a_complete_list_needs_no_closing_tag(tail):
    assert whole(OPEN + ONE + tail) == ([["f", '{"a": 1}']], "")
    assert streamed(OPEN + ONE + tail)[:2] == ([["f", '{"a": 1}']], "")


def test_what_follows_a_list_is_content_if_it_is_no_closing_tag():
    assert whole(OPEN + ONE + "\n</TOOLBOX>") == ([["f", '{"a": 1}']], "\n</TOOLBOX>")


def test_events_come_as_soon_as_they_are_certain():
    scanner = ToolCallScanner()
    assert scanner.feed("Hi <TO") == [Content("Hi ")]
    assert scanner.feed('OLCALL>[{"name": "f", "argume') == []
    assert scanner.feed('nts": ') == []
    assert scanner.feed('{"a": "b') == [CallBegin(0, "f"), Arguments(0, '{"a": "b')]
    assert scanner.feed('c"') == [Arguments(0, 'c"')]
    assert scanner.feed("}}") == [Arguments(0, "}")]
    text = OPEN + '[{"name": "f", "arguments": {"a": "bc"}}, {'
    # What no event has carried is content: it begins with the brace behind the arguments.
    assert scanner.feed(", {]") == [Broken("}, {", text, 1), Content("]")]
    assert scanner.finish() == []


def test_deep_nesting_and_long_strings_are_no_trouble():
    deep = "[" * 20000 + "]" * 20000
    arguments = f'{{"a": {deep}, "b": "{"x" * 100000}"}}'
    text = f'{OPEN}[{{"name": "f", "arguments": {arguments}}}]{CLOSE}'
    assert whole(text) == ([["f", arguments]], "")


@ANY_SPEED
@given(JSON, SEPARATORS)
def test_json_is_recognised(value, separators):
    text = json.dumps(value, separators=separators) + " "
    reader, taken = JsonValue(), 0
    while not reader.done:
        taken += reader.feed(text[taken])
    assert text[:taken] == text[:-1]


@settings(ANY_SPEED, max_examples=400)
@given(st.text('[]{}":,0123.eE+-truefalsn \\u/', max_size=12))
def test_what_python_cannot_read_is_not_recognised(text):
    reader = JsonValue()
    try:
        for place, char in enumerate(text):
            taken = reader.feed(char)
            if reader.done:
                json.loads(text[: place + taken])
                return
    except Malformed:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


@ANY_SPEED
@given(st.text("<TOLCA>/x", max_size=12))
def test_the_part_of_a_text_that_may_become_a_tag(text):
    lengths = [n for n in range(len(OPEN)) if text.endswith(OPEN[:n])]
    assert possible_tag(text, OPEN) == max(lengths)
