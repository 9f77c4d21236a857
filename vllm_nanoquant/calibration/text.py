# SPDX-License-Identifier: Apache-2.0
"""Calibration text: from a file to sequences of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

# Red Hat's published settings for Nemotron-Nano-9B-v2 (W4A16, GPTQ).
SAMPLES = 1024
SEQUENCE_LENGTH = 8192

_SHORTEST = 2


class CalibrationError(ValueError):
    """A calibration that cannot be done; the text names the value, the place and the way out."""


def load_sequences(
    path: Path, tokenizer: Any, samples: int = SAMPLES, length: int = SEQUENCE_LENGTH
) -> list[torch.Tensor]:
    """Read a text file and cut it into sequences of token ids.

    A ``.jsonl`` file has a JSON object on each line, with a ``text`` or with ``messages`` for the
    checkpoint's chat template; each of the first `samples` lines gives one sequence, cut after
    `length` tokens. Anything else is plain UTF-8 text: `samples` windows of `length` tokens, spread
    evenly over all of it, as many as fit side by side; a shorter text is one sequence.

    Args:
        path: the file.
        tokenizer: a transformers tokenizer, as `load_tokenizer` gives it.
        samples: most sequences.
        length: most tokens of a sequence.

    Returns:
        Sequences, int64 [tokens] each.

    Raises:
        CalibrationError: a file that cannot be read or has no text, lines that are not as above,
            ``messages`` without a chat template, samples or length below 1.
    """
    if samples < 1 or length < _SHORTEST:
        raise CalibrationError(
            f"{samples} calibration samples of {length} tokens: at least 1 of {_SHORTEST} is needed"
        )
    try:
        if path.suffix == ".jsonl":
            sequences = _from_json_lines(path, tokenizer, samples, length)
        else:
            sequences = _from_plain_text(path, tokenizer, samples, length)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration text {path} cannot be read: {error}") from error
    sequences = [ids for ids in sequences if len(ids) >= _SHORTEST]
    if not sequences:
        raise CalibrationError(f"calibration text {path} has no text in it")
    return [torch.tensor(ids, dtype=torch.int64) for ids in sequences]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, through transformers; code in the folder is not run.

    Raises CalibrationError if there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CalibrationError(
            f"the tokenizer in {folder} cannot be loaded ({reason}); calibration needs "
            "tokenizer.json or the like beside the weights"
        ) from error


def _from_plain_text(path: Path, tokenizer: Any, samples: int, length: int) -> list[list[int]]:
    ids = _encode(tokenizer, path.read_text(encoding="utf-8"))
    count = min(samples, len(ids) // length)
    if count <= 1:
        return [ids[:length]]
    step = (len(ids) - length) / (count - 1)
    starts = [int(i * step) for i in range(count)]
    return [ids[start : start + length] for start in starts]


def _from_json_lines(path: Path, tokenizer: Any, samples: int, length: int) -> list[list[int]]:
    with path.open(encoding="utf-8") as lines:
        records = islice(_records(lines, path), samples)
        return [_encode_record(*record, tokenizer, path)[:length] for record in records]


def _records(lines: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not {"text", "messages"} & record.keys():
            raise CalibrationError(
                f"{path}, line {number} has neither 'text' nor 'messages'; each line must be a "
                "JSON object with one of them"
            )
        yield number, record


def _encode_record(number: int, record: dict[str, Any], tokenizer: Any, path: Path) -> list[int]:
    if isinstance(record.get("text"), str):
        return _encode(tokenizer, record["text"])
    try:
        text = tokenizer.apply_chat_template(record.get("messages"), tokenize=False)
    except Exception as error:  # a template is a program of the checkpoint's author: anything
        raise CalibrationError(
            f"{path}, line {number}: the checkpoint's chat template cannot write these messages "
            f"({error}); give plain 'text' instead"
        ) from error
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    # Not verbose: a text longer than the model's context is no mistake here.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])
