# SPDX-License-Identifier: Apache-2.0
"""Whole numbers from a config.json that somebody else wrote, and how sizes are read and told."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_nanoquant.checkpoint.errors import UsageError, printable
from vllm_nanoquant.planner.errors import PlanError

GIB = 1 << 30
MIB = 1 << 20

_LARGEST = 1 << 31
_LARGEST_GPU = 1 << 42
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?I?B|)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``24GiB`` (binary), ``24GB`` (decimal), ``24564MiB`` or a plain number of bytes.

    Raises:
        ValueError: anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = found[2].upper() if found else None
    if found is None or unit not in _UNITS:
        raise ValueError(f"{printable(text)!r} is not a size like 24GiB, 24GB or 24564MiB")
    whole, _, fraction = found[1].partition(".")
    # Exact: a float has too few digits for bytes.
    return int(whole + fraction) * _UNITS[unit] // 10 ** len(fraction)


def parse_memory(text: str) -> int:
    """Bytes of a GPU's memory, as `parse_size` reads them.

    Raises:
        UsageError: it is no size, or none that a GPU has.
    """
    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"--gpu-memory: {error}") from None
    if not GIB <= size <= _LARGEST_GPU:
        raise UsageError(
            f"--gpu-memory {printable(text)}: no GPU has {gib(size)}; give a unit, as in 24GiB"
        )
    return size


def gib(count: float) -> str:
    """Bytes for people, in GiB as vLLM tells them."""
    return f"{count / GIB:.2f} GiB"


def count_of(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """A positive whole number of a model's config.json, under the first of `names` it has.

    Raises:
        PlanError: it is missing and there is no default, or it is not such a number.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 < value < _LARGEST:
            raise PlanError(
                f"config.json: {name} is {printable(repr(value))}; it must be a whole number "
                "above 0"
            )
        return value
    if default is None:
        raise PlanError(f"config.json: {' or '.join(names)} is missing; fetch config.json again")
    return default


def split(count: int, ranks: int) -> int:
    """A rank's part of something, where the last rank's may be smaller."""
    return -(-count // ranks)
