# SPDX-License-Identifier: Apache-2.0
"""The header of one safetensors file, checked before anything believes it.

The format: 8 bytes little-endian, the length of the header; the header, a JSON object of dtype,
shape and offsets for each tensor; the tensors' bytes, one after the other.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import CheckpointError, at, printable
from vllm_nanoquant.checkpoint.untrusted import MAX_HEADER, open_regular, parse_object

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of an element, by the names that safetensors gives dtypes."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_DIMENSIONS = 16
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: full name.
        dtype: safetensors' name of it.
        shape: as in the header.
        start: offset of its first byte in the file.
        nbytes: number of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardHeader:
    """The header of one file.

    Attributes:
        path: the file.
        size: its bytes.
        tensors: by name, in the order of their bytes, which leave no gap.
    """

    path: Path
    size: int
    tensors: dict[str, TensorEntry]


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; dtypes of less than a byte are packed without gaps."""
    return -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated or not safetensors, or the header is too long, not
            JSON, or describes tensors that overlap, leave gaps or do not fit the file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _LENGTH_BYTES:
            raise CheckpointError(
                f"{at(path)}: {size} bytes are too few for a safetensors file; it is truncated"
            )
        length = int.from_bytes(_read_exactly(file, _LENGTH_BYTES, path), "little")
        if length > size - _LENGTH_BYTES:
            raise CheckpointError(
                f"{at(path)}: a header of {length} bytes in a file of {size}; it is truncated or "
                "not a safetensors file"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{at(path)}: a header of {length} bytes; the limit is {MAX_HEADER}"
            )
        entries = parse_object(_read_exactly(file, length, path), f"{at(path)}: header")
    data_start = _LENGTH_BYTES + length
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{at(path)}: {_METADATA} is not an object of strings")
    tensors = [_check_entry(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_layout(path, tensors, data_start, size)
    return ShardHeader(path, size, {tensor.name: tensor for tensor in tensors})


def _read_exactly(file: Any, count: int, path: Path) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = file.read(count - len(data))
        if not part:
            raise CheckpointError(f"{at(path)}: ends within its header; it is truncated")
        data += part
    return bytes(data)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorEntry:
    """One tensor's part of the header, with its offset counted from the start of the file."""
    place = at(path, name)
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise CheckpointError(f"{place}: the header must give dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{place}: the dtype is not a string")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{place}: the dtype {printable(dtype)!r} is unknown")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{place}: the shape is not a list of up to {_MAX_DIMENSIONS} sizes")
    if not all(map(_is_size, shape)):
        raise CheckpointError(f"{place}: the shape holds something that is not a size")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{place}: the data_offsets are not two whole numbers")
    begin, end = offsets
    if end - begin != nbytes_of(dtype, shape):
        raise CheckpointError(
            f"{place}: {dtype} {shape} takes {nbytes_of(dtype, shape)} bytes, and the offsets "
            f"{begin} to {end} leave {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(path: Path, tensors: list[TensorEntry], data_start: int, size: int) -> None:
    """Tensors in the order of their bytes must fill the file from `data_start` to its end."""
    position = data_start
    for tensor in tensors:
        if tensor.start < position:
            raise CheckpointError(
                f"{at(path, tensor.name)}: begins at byte {tensor.start} and overlaps the tensor "
                f"before it, which ends at byte {position}"
            )
        if tensor.start > position:
            raise CheckpointError(
                f"{at(path, tensor.name)}: begins at byte {tensor.start} and leaves a gap after "
                f"byte {position}"
            )
        position += tensor.nbytes
    if position > size:
        last = next(tensor for tensor in tensors if tensor.start + tensor.nbytes > size)
        raise CheckpointError(
            f"{at(path, last.name)}: its bytes {last.start} to {last.start + last.nbytes} are not "
            f"all in the file, which has {size}; it is truncated"
        )
    if position < size:
        raise CheckpointError(f"{at(path)}: {size - position} bytes after the last tensor")


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and header of a safetensors file, for tensors given as name, dtype and shape.

    Their bytes follow in the same order. Padded so that they begin at a multiple of 8 bytes.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
