# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.calibration.models import TEXT, TINY
from vllm_nanoquant.calibration.text import CalibrationError, load_sequences, load_tokenizer

TOKENIZER = load_tokenizer(TINY)
IDS = TOKENIZER(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"]


def write_lines(path: Path, *records: object) -> Path:
    file = path / "text.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def test_windows_are_spread_over_the_text() -> None:
    found = [ids.tolist() for ids in load_sequences(TEXT, TOKENIZER, samples=4, length=100)]
    assert [len(ids) for ids in found] == [100] * 4
    assert found[0] == IDS[:100] and found[-1] == IDS[-100:]
    joined = ",".join(map(str, IDS))
    assert all(",".join(map(str, ids)) in joined for ids in found)


def test_as_many_windows_as_fit() -> None:
    assert len(load_sequences(TEXT, TOKENIZER, 10**6, 100)) == len(IDS) // 100
    (whole,) = load_sequences(TEXT, TOKENIZER, 8, len(IDS) + 5)
    assert whole.tolist() == IDS


def test_lines_of_json(tmp_path: Path) -> None:
    file = write_lines(tmp_path, {"text": "She could not help it."}, {"text": "The carriage " * 50})
    with file.open("a") as out:
        out.write("\n\n" + json.dumps({"text": "never read"}))
    found = load_sequences(file, TOKENIZER, samples=2, length=20)
    assert found[0].tolist() == TOKENIZER("She could not help it.")["input_ids"]
    assert len(found) == 2 and len(found[1]) == 20


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} said {{ m.content }}{% endfor %}"
    file = write_lines(tmp_path, {"messages": [{"role": "she", "content": "no"}]})
    (found,) = load_sequences(file, tokenizer)
    assert tokenizer.decode(found).strip() == "she said no"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": 1}', "line 2 has neither 'text' nor 'messages'"),
        ("[1]", "line 1 has neither"),
        ("{", "line 1 is not JSON"),
        ('{"messages": 3}', "line 1: the checkpoint's chat template cannot write"),
        ('{"text": ""}', "has no text in it"),
        ("", "has no text in it"),
    ],
)
def test_lines_that_make_no_sense(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_sequences(file, TOKENIZER)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"missing.txt cannot be read"):
        load_sequences(tmp_path / "missing.txt", TOKENIZER)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"bytes.txt cannot be read"):
        load_sequences(tmp_path / "bytes.txt", TOKENIZER)
    with pytest.raises(CalibrationError, match="0 calibration samples"):
        load_sequences(TEXT, TOKENIZER, samples=0)
    with pytest.raises(CalibrationError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)
