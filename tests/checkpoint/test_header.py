# SPDX-License-Identifier: Apache-2.0
"""Headers of safetensors files, written byte by byte."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.strategies import MANY, values
from vllm_nanoquant.checkpoint.errors import CheckpointError
from vllm_nanoquant.checkpoint.header import encode_header, read_header


def file_with(folder, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "size", "length", "text"),
    [
        (b"{}", 0, 2**63, "truncated or not a safetensors file"),
        (b"{}", 0, 2**64 - 1, "truncated or not a safetensors file"),
        (b"{}", 0, 3, "truncated or not a safetensors file"),
        ({"a": entry()}, 3, None, "a: its bytes 68 to 72 are not all in the file, which has 71"),
        ({"a": entry()}, 5, None, "1 bytes after the last tensor"),
        ({"a": entry(offsets=(0, 5))}, 5, None, "a: U8 [4] takes 4 bytes, and the offsets 0 to 5"),
        ({"a": entry(offsets=(4, 0))}, 4, None, "a: U8 [4] takes 4 bytes"),
        ({"a": entry(offsets=(-4, 0))}, 4, None, "a: the data_offsets are not two whole numbers"),
        ({"a": entry(offsets=(0, 4, 4))}, 4, None, "a: the data_offsets"),
        ({"a": entry(offsets=(0.0, 4.0))}, 4, None, "a: the data_offsets"),
        ({"a": entry(offsets=(2**62, 2**62 + 4))}, 4, None, "a: begins at byte"),
        ({"a": entry(), "b": entry()}, 4, None, "b: begins at byte 128 and overlaps"),
        ({"a": entry(), "b": entry(offsets=(5, 9))}, 9, None, "b: begins at byte .* leaves a gap"),
        ({"a": entry(shape=(2**40, 2**40, 0, 4))}, 0, None, "a: U8 .* takes 0 bytes"),
        ({"a": entry(shape=(-2, -2))}, 4, None, "a: the shape"),
        ({"a": entry(shape=(True,) * 4)}, 4, None, "a: the shape"),
        ({"a": entry(shape=(1,) * 99)}, 4, None, "a: the shape"),
        ({"a": entry(dtype="X7")}, 4, None, "a: the dtype 'X7' is unknown"),
        ({"a": entry(dtype=["U8"])}, 4, None, "a: the dtype is not a string"),
        ({"a": [1]}, 4, None, "a: the header must give"),
        ({"a": entry() | {"more": 1}}, 4, None, "a: the header must give"),
        ({"__metadata__": {"a": 1}}, 0, None, "__metadata__"),
        ({"__metadata__": []}, 0, None, "__metadata__"),
        (b'{"a":1,"a":1}', 0, None, "the key a is there twice"),
        (b'{"\xff":1}', 0, None, "not UTF-8"),
        (b"[" * 3000, 0, None, "nested too deeply"),
        (b'{"a": 1' + b"1" * 5000 + b"}", 0, None, "not JSON"),
        (b'{"\\u001b[2J": 1}', 0, None, r"\x1b[2J: the header must give"),
    ],
    ids=range(28),
)  # fmt: skip
def test_hostile_headers(tmp_path, header, size, length, text):
    path = file_with(tmp_path, header, bytes(size), length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "x.safetensors: " in str(caught.value)
    for part in text.split(" .* "):
        assert part in str(caught.value)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(2 << 30)  # a hole: no disk is used
    with pytest.raises(CheckpointError, match="the limit is 33554432"):
        read_header(path)


def test_headers_of_the_library_are_read_and_ours_by_the_library(tmp_path):
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(2).bfloat16(), "empty": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors").tensors
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: entry.shape for name, entry in found.items()
    }
    data = encode_header([("u", "U8", (3,)), ("f", "F32", (2,))]) + bytes(11)
    (tmp_path / "y.safetensors").write_bytes(data)
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "y.safetensors").items()} == {
        "u": (3,), "f": (2,)
    }  # fmt: skip


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", "I32"]) | values,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | values,
    }
)


@pytest.mark.slow
@MANY
@given(
    header=st.dictionaries(st.text(max_size=6), entries | values, max_size=4),
    data=st.binary(max_size=100),
)
def test_random_headers(tmp_path, header, data):
    path = file_with(tmp_path, header, data)
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert str(error).startswith("x.safetensors: ")
        assert str(error).isprintable()
    else:
        assert sum(tensor.nbytes for tensor in found.tensors.values()) == len(data)
