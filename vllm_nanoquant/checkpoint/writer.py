# SPDX-License-Identifier: Apache-2.0
"""Shards of safetensors, written tensor by tensor, that appear whole or not at all.

All sizes are known before the first byte is written, so a shard's header comes first and no more
than one tensor is in memory. An interrupted shard is taken up after its last good tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, printable
from vllm_nanoquant.checkpoint.header import encode_header, nbytes_of
from vllm_nanoquant.checkpoint.journal import Journal
from vllm_nanoquant.checkpoint.reader import read_range
from vllm_nanoquant.checkpoint.untrusted import open_regular
from vllm_nanoquant.files import durable, partial_name


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return nbytes_of(self.dtype, self.shape)


class Item(Protocol):
    """What is written, and can be taken up, in one go."""

    @property
    def key(self) -> str:
        """Name of it in the journal; no two items have the same."""

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """Its tensors, in the order of their bytes."""


ItemT = TypeVar("ItemT", bound=Item)


@dataclass(frozen=True)
class Produced:
    """The bytes of an item.

    Attributes:
        parts: the bytes of its tensors, one after the other, cut anywhere.
        record: what the report says of it; plain JSON.
    """

    parts: Iterable[bytes | memoryview]
    record: dict[str, Any]


@dataclass(frozen=True)
class PlannedShard(Generic[ItemT]):
    """One file of the result."""

    name: str
    items: tuple[ItemT, ...]

    @property
    def header(self) -> bytes:
        """The file's first bytes, before the tensors."""
        return encode_header(
            (out.name, out.dtype, out.shape) for item in self.items for out in item.outputs
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(nbytes_of_item, self.items))


def nbytes_of_item(item: Item) -> int:
    """Bytes of an item's tensors."""
    return sum(output.nbytes for output in item.outputs)


def cut_into_shards(items: Sequence[ItemT], max_bytes: int) -> tuple[PlannedShard[ItemT], ...]:
    """Cut items into files, in order. The same arguments give the same files.

    A file holds what fits into `max_bytes`, and at least one item.

    Raises:
        CheckpointError: two tensors have the same name.
    """
    names: set[str] = set()
    shards: list[list[ItemT]] = [[]]
    filled = 0
    for item in items:
        for output in item.outputs:
            if output.name in names:
                raise CheckpointError(
                    f"{printable(output.name)}: the result would have two tensors of this name, "
                    "one of the source's own and one of the int4 form of a weight"
                )
            names.add(output.name)
        size = nbytes_of_item(item)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    file_names = naming.shard_names(len(shards))
    for shard in shards:
        # Sizes that are no multiple of 8 come last, so that they push no tensor off the alignment
        # that some readers need.
        shard.sort(key=lambda item: any(output.nbytes % 8 for output in item.outputs))
    return tuple(PlannedShard(n, tuple(s)) for n, s in zip(file_names, shards, strict=True))


def weight_map(shards: Iterable[PlannedShard[Any]]) -> dict[str, str]:
    """File of each tensor."""
    return {
        output.name: shard.name
        for shard in shards
        for item in shard.items
        for output in item.outputs
    }


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU, as they lie in a file; not a copy where it is there."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_shard(
    path: Path,
    shard: PlannedShard[ItemT],
    produce: Callable[[ItemT], Produced],
    journal: Journal,
    done: Callable[[ItemT], None],
) -> str:
    """Write one shard, or the part of it that is missing, and return the SHA-256 of the file.

    Args:
        path: the file.
        shard: what belongs in it.
        produce: makes an item's bytes.
        journal: gets the record of each item, with the SHA-256 of its bytes.
        done: told of each item that is in the file, old or new.

    Raises:
        CheckpointError: `produce` made another number of bytes than was planned.
        OSError: the file cannot be written.
    """
    if path.exists():
        path.replace(partial_name(path))
    header = shard.header
    with durable(path) as temporary:
        kept, position, whole = _good_part(temporary, shard, header, journal)
        for item in shard.items[:kept]:
            done(item)
        with temporary.open("r+b" if position else "wb") as file:
            file.truncate(position)
            file.seek(position)
            if not position:
                file.write(header)
                whole.update(header)
            for item in shard.items[kept:]:
                produced = produce(item)
                own, written = hashlib.sha256(), 0
                for part in produced.parts:
                    file.write(part)
                    whole.update(part)
                    own.update(part)
                    written += len(part)
                if written != nbytes_of_item(item):
                    raise CheckpointError(
                        f"{printable(item.key)}: {written} bytes were made and "
                        f"{nbytes_of_item(item)} were planned; please report this"
                    )
                file.flush()
                journal.add(item.key, {"sha256": own.hexdigest(), "record": produced.record})
                done(item)
    return whole.hexdigest()


def _good_part(
    path: Path, shard: PlannedShard[Any], header: bytes, journal: Journal
) -> tuple[int, int, Any]:
    """How many items at the start of a partial file are what the journal says, by their bytes.

    Returns:
        Their number, the offset after the last of them, and a SHA-256 of everything up to there.
        Where not even the header is right: 0, 0 and an empty one.
    """
    empty = 0, 0, hashlib.sha256()
    if not path.exists():
        return empty
    with open_regular(path) as file:
        if file.read(len(header)) != header:
            return empty
        whole = hashlib.sha256(header)
        position = len(header)
        for index, item in enumerate(shard.items):
            entry = journal.get(item.key)
            if entry is None:
                return index, position, whole
            own, ahead = hashlib.sha256(), whole.copy()
            try:
                for part in read_range(file, position, nbytes_of_item(item), path.name):
                    own.update(part)
                    ahead.update(part)
            except CheckpointError:  # shorter than the journal: lost in a power cut
                return index, position, whole
            if own.hexdigest() != entry.get("sha256"):
                return index, position, whole
            whole = ahead
            position += nbytes_of_item(item)
    return len(shard.items), position, whole
