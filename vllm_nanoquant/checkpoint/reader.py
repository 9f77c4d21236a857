# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a set of tensors: checked when opened, each tensor read when asked for.

Files are read, not mapped: pages of a mapped file count as this process's memory for as long as the
system likes, and a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.header import ShardHeader, TensorEntry, read_header
from vllm_nanoquant.checkpoint.untrusted import (
    MAX_CONFIG,
    MAX_INDEX,
    check_inside,
    check_shard_name,
    open_regular,
    read_object,
)

CHUNK_BYTES = 1 << 24
"""Bytes read at a time where a tensor need not be whole in memory."""

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
"""Dtypes that can be loaded, by the names that safetensors gives them."""

_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ShardList:
    """Which files a checkpoint consists of.

    Attributes:
        folder: where they lie.
        names: file names, sorted.
        weight_map: file name of each tensor by the index; None where there is no index.
    """

    folder: Path
    names: tuple[str, ...]
    weight_map: dict[str, str] | None


class Checkpoint:
    """The tensors of a checkpoint that is sound as far as headers and index tell."""

    def __init__(self, folder: Path, config: dict[str, Any], shards: Iterable[ShardHeader]) -> None:
        """Put a checkpoint together from parts that are checked; `open` does both.

        Args:
            folder: where it lies.
            config: config.json.
            shards: headers of its files.
        """
        self.folder = folder
        self.config = config
        self.shards = tuple(shards)
        self._homes = {name: shard for shard in self.shards for name in shard.tensors}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint of safetensors files.

        Raises:
            CheckpointError: anything in config.json, the index or a header is wrong, a shard is
                missing, or index and headers disagree.
            UsageError: not a folder, or its weights are pickle files.
        """
        if not folder.is_dir():
            raise UsageError(f"{printable(str(folder))} is not a folder")
        listed = list_shards(folder)
        check_inside(folder / naming.CONFIG)
        config = read_object(folder / naming.CONFIG, MAX_CONFIG)
        shards = [read_shard(folder, name) for name in listed.names]
        for problem in disagreements(listed, shards):
            raise CheckpointError(problem)
        return cls(folder, config, shards)

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name, in the order of files and of bytes within them."""
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}

    def file_of(self, name: str) -> Path:
        """File that holds a tensor. Raises KeyError for a tensor that is not there."""
        return self._homes[name].path

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor whole, on the CPU.

        Raises:
            CheckpointError: the file has become shorter, or torch lacks the dtype.
            KeyError: no such tensor.
        """
        entry = self.tensors[name]
        place = at(self.file_of(name), name)
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{place}: the dtype {entry.dtype} cannot be loaded")
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        data = bytearray(entry.nbytes)
        view = memoryview(data)
        with open_regular(self.file_of(name)) as file:
            file.seek(entry.start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{place}: the file ends within it; it is truncated")
                view = view[count:]
        return torch.frombuffer(data, dtype=dtype).view(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Give the bytes of a tensor in parts of at most `CHUNK_BYTES`.

        Raises:
            CheckpointError: the file has become shorter.
            KeyError: no such tensor.
        """
        entry = self.tensors[name]
        with open_regular(self.file_of(name)) as file:
            yield from read_range(file, entry.start, entry.nbytes, at(self.file_of(name), name))


def read_range(file: Any, start: int, count: int, place: str) -> Iterator[bytes]:
    """Give `count` bytes of an open file from `start`, in parts of at most `CHUNK_BYTES`.

    Raises:
        CheckpointError: the file ends before.
    """
    file.seek(start)
    while count:
        part = file.read(min(count, CHUNK_BYTES))
        if not part:
            raise CheckpointError(f"{place}: the file ends within it; it is truncated")
        count -= len(part)
        yield part


def list_shards(folder: Path) -> ShardList:
    """List the files of a checkpoint: those that its index names, or else all safetensors files.

    Raises:
        CheckpointError: the index is wrong, or names a file outside the folder.
        UsageError: there is no safetensors file.
    """
    index_path = folder / naming.INDEX
    if index_path.is_symlink() or index_path.exists():
        weight_map = read_index(index_path)
        return ShardList(folder, tuple(sorted(set(weight_map.values()))), weight_map)
    names = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
    if not names:
        raise UsageError(_no_safetensors(folder))
    return ShardList(folder, tuple(names), None)


def read_index(path: Path) -> dict[str, str]:
    """Read which file holds each tensor, from a ``model.safetensors.index.json``.

    Raises:
        CheckpointError: not an index, empty, or a name that leads out of the folder.
    """
    check_inside(path)
    weight_map = read_object(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{at(path)}: weight_map is not an object with tensors in it")
    return {name: check_shard_name(file, at(path, name)) for name, file in weight_map.items()}


def read_shard(folder: Path, name: str) -> ShardHeader:
    """Read the header of one file of a checkpoint.

    Raises:
        CheckpointError: it is missing, leads out of the folder, or as `header.read_header`.
    """
    path = folder / name
    if not path.is_symlink() and not path.exists():
        raise CheckpointError(f"{at(path)}: the file is missing")
    check_inside(path)
    return read_header(path)


def disagreements(listed: ShardList, shards: Iterable[ShardHeader]) -> Iterator[str]:
    """Say where an index and the headers of its files differ, or where two files hold one tensor.

    Args:
        listed: the files and the index.
        shards: the headers that could be read; nothing is said about other files.
    """
    homes: dict[str, Path] = {}
    read = set()
    for shard in shards:
        read.add(shard.path.name)
        for name in shard.tensors:
            if name in homes:
                yield f"{at(shard.path, name)}: is in {at(homes[name])} as well"
            homes[name] = shard.path
            expected = (listed.weight_map or {name: shard.path.name}).get(name)
            if expected is None:
                yield f"{at(shard.path, name)}: is not in {naming.INDEX}"
            elif expected != shard.path.name:
                yield f"{at(shard.path, name)}: {naming.INDEX} says it is in {printable(expected)}"
    for name, file in (listed.weight_map or {}).items():
        if name not in homes and file in read:
            yield f"{at(file, name)}: is in {naming.INDEX}, and not in the file"


def _no_safetensors(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_ENDINGS)
    text = f"{printable(str(folder))} has no safetensors file"
    if not pickles:
        return text
    return (
        f"{text}, only pickle files like {printable(pickles[0])}, which can run code when they are "
        "read and are refused. Look for a safetensors revision of the model on its page, or load "
        "it where you trust it and save it again with save_pretrained(..., "
        "safe_serialization=True)"
    )


def canonical_json(value: Any) -> str:
    """JSON of a value, the same text for the same value: for digests and for files we write."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
