# SPDX-License-Identifier: Apache-2.0
"""How the kernels are cut up for a shape on a GPU: tables of measured settings, rules for the rest.

A table is `tuning/sm<capability>.json`, written by `python -m vllm_nanoquant.kernels.tune`. It
counts for GPUs of its capability and number of multiprocessors. Nothing is measured while serving.
This module does not import Triton.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import product
from typing import Any, NamedTuple

import torch

from vllm_nanoquant.kernels.layout import RuntimeWeight, groups_per_chunk

REGISTERS = 65536
"""32-bit registers of a multiprocessor, SM80 to SM120."""
QUARTERS = 4
"""Parts of a multiprocessor; each has its share of the registers for its own warps."""
FUSED_LIMIT = 2048
"""Most tokens of one fused product; a weight of more tokens is dequantized."""

BUSY = 0.75
"""Share of the GPU that has to be busy where `fused` gives tiles the same number of programs each.

On an H200 that gains five to twenty percent where the share is 0.79 and more, and loses some where
it is 0.71 and less.
"""


def limit_registers(registers: int) -> dict[str, int]:
    """Triton's option for the most registers per thread; 0: as the compiler likes."""
    return {"maxnreg": registers} if registers else {}


@dataclass(frozen=True)
class DecodeLaunch:
    """How `decode` runs up to 8, or up to 16, tokens; bits do not depend on it."""

    tiles: int
    """Tiles of 16 rows per warp."""
    warps_n: int
    """Warps side by side along N."""
    prefetch: int
    """Chunks of 128 columns that a warp loads ahead: 1 or 2."""
    registers: int = 0
    """Most registers per thread, so that more programs run at once; 0: as the compiler likes."""


@dataclass(frozen=True)
class DecodeSettings:
    """How `decode` cuts K, which decides the order of its sums; the same for 1 to 16 tokens."""

    warps_k: int
    """Warps of a program that take turns along K."""
    split: int
    """Programs that share a row of tiles."""
    up_to_8: DecodeLaunch
    up_to_16: DecodeLaunch

    def launch(self, tokens: int) -> DecodeLaunch:
        """How to run a number of tokens."""
        return self.up_to_8 if tokens <= 8 else self.up_to_16


class Work(NamedTuple):
    """How `fused` shares the tiles of its result out."""

    programs: int
    own: int
    """Tiles that each program has to itself."""
    front_tiles: int
    """Of the tiles that are left, how many the programs in front share."""
    front: int
    """Programs, the first ones, that share these, in equal runs of chunks."""
    back: int
    """Programs after them that share the rest, in equal runs of chunks."""


@dataclass(frozen=True)
class FusedSettings:
    """How `fused` tiles its result, up to a number of tokens."""

    up_to: int
    """Most tokens that these settings are for."""
    rows: int
    """Rows of W per tile of the result."""
    tokens: int
    """Tokens per tile of the result."""
    warps: int
    stages: int
    """Tiles of x and W in flight."""
    per_multiprocessor: int
    """Programs that run at once on a multiprocessor."""
    prefetch: bool = False
    """Words come straight into registers, not through shared memory."""

    def share_out(self, tiles: int, chunks: int, multiprocessors: int) -> Work:
        """Give each program of `fused` tiles of its own, and all of them the rest to share.

        Programs that run at once on a multiprocessor share its time: where two or more of them fall
        to each tile that is left, all are used, and some tiles get one more than others. Else the
        longest run counts: each tile gets the same number or, if less than BUSY of the GPU would
        have work then, runs of chunks begin and end anywhere.
        """
        slots = self.per_multiprocessor * multiprocessors
        own, rest = divmod(tiles, slots)
        if rest == 0:
            return Work(slots, own, 0, 0, 0)
        units = rest * chunks
        sharers = min(slots, units, 2**31 // units - 2)  # the kernel multiplies in 32 bits
        each, more = divmod(sharers, rest)
        front_tiles, front = rest, sharers
        if each > 1 and self.per_multiprocessor > 1:
            front_tiles, front = more, more * (each + 1)
        elif each and tiles >= BUSY * slots * (own + 1 / each):
            front = sharers = rest * each
        return Work(slots if own else sharers, own, front_tiles, front, sharers - front)


class Gpu(NamedTuple):
    """What settings depend on; a tuple, since each product looks settings up by it."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def family(self) -> str:
        """Name of its table: sm86, sm90."""
        return f"sm{self.capability[0]}{self.capability[1]}"

    @property
    def is_hopper(self) -> bool:
        """Whether Triton multiplies with Hopper's asynchronous instruction, and TMA is used."""
        return self.capability[0] == 9


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Capability and multiprocessors of a CUDA device; an RTX 3090's elsewhere (for tests)."""
    if device.type != "cuda":
        return Gpu((8, 6), 82)
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count)


def is_hopper(device: torch.device) -> bool:
    """Whether it is a Hopper GPU."""
    return gpu_of(device).is_hopper


def launch_options(device: torch.device, num_warps: int, num_stages: int) -> dict[str, Any]:
    """Triton's launch options, and the kernels' PDL argument.

    From SM90 on a kernel may start while the one before it ends (programmatic dependent launch).
    """
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "PDL": False}
    if gpu_of(device).capability[0] >= 9:
        options.update(PDL=True, launch_pdl=True)
    return options


@functools.cache
def table(family: str) -> dict[str, Any]:
    """The table of a GPU family, empty where there is none.

    Raises:
        ValueError: the file is no table.
    """
    path = files("vllm_nanoquant.kernels") / "tuning" / f"{family}.json"
    return read_table(path) if path.is_file() else {}


def read_table(path: Traversable) -> dict[str, Any]:
    """Read a file as the tuner writes it.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"capability", "multiprocessors", "shapes"} - set(found):
            raise ValueError(f"no {min(missing)!r}")
        for entry in found["shapes"].values():
            _decode_of(entry)
            _fused_of(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of kernel settings ({type(error).__name__}: {error}); remove it, "
            "or write it again with python -m vllm_nanoquant.kernels.tune"
        ) from error
    return found


def _decode_of(entry: dict[str, Any]) -> DecodeSettings | None:
    """Settings of `decode` of a shape in a table, if it has some."""
    if not (found := entry.get("decode")):
        return None
    launches = (DecodeLaunch(**found[name]) for name in ("up_to_8", "up_to_16"))
    return DecodeSettings(found["warps_k"], found["split"], *launches)


def _fused_of(entry: dict[str, Any]) -> tuple[FusedSettings, ...]:
    """Settings of `fused` of a shape in a table, none where it has none."""
    return tuple(FusedSettings(**each) for each in entry.get("fused") or ())


def _entry(gpu: Gpu, n: int, k: int) -> dict[str, Any]:
    measured = table(gpu.family)
    if measured.get("multiprocessors") != gpu.multiprocessors:
        return {}
    return measured["shapes"].get(f"{n}x{k}", {})


@functools.cache
def _decode_settings(gpu: Gpu, n: int, k: int, chunks: int) -> DecodeSettings:
    return _decode_of(_entry(gpu, n, k)) or decode_rule(gpu, n, chunks)


def decode_settings(weight: RuntimeWeight, device: torch.device) -> DecodeSettings:
    """Settings of `decode` for a weight: from the table, else by the rule."""
    return _fitted_settings(gpu_of(device), *weight.shape, weight.chunks, weight.group_size)


@functools.cache
def _fitted_settings(gpu: Gpu, n: int, k: int, chunks: int, group_size: int) -> DecodeSettings:
    """Settings with registers for the group size and the alignment."""
    chosen = _decode_settings(gpu, n, k, chunks)
    short, long = chosen.up_to_8, chosen.up_to_16
    # The limits of registers were measured with groups of 128 in rows of whole 16 columns.
    if n % 16 or k % 16:
        # Addresses of single numbers: all that a thread can have.
        short, long = replace(short, registers=255), replace(long, registers=255)
    elif groups_per_chunk(group_size) > 1:
        short, long = replace(short, registers=0), replace(long, registers=0)
    if group_size == 32:
        # Four groups per chunk and 16 tokens leave no registers for more.
        long = replace(long, tiles=2, prefetch=1)
    return replace(chosen, up_to_8=short, up_to_16=long)


class Cut(NamedTuple):
    """A way to cut K, and what it comes to with two tiles per warp."""

    warps_k: int
    """Warps of a program that take turns along K."""
    split: int
    """Programs that share a row of tiles."""
    steps: int
    """Chunks of each warp, at most."""
    warps: int
    """Warps per multiprocessor, at most."""


def cuts(
    gpu: Gpu, n: int, chunks: int, warps_per_program: Iterable[int], most_parts: int
) -> Iterator[Cut]:
    """Ways to cut K into at most so many programs, none without work."""
    tiles = -(-n // 32)
    for warps_k, split in product(warps_per_program, range(1, most_parts + 1)):
        steps = -(-chunks // (warps_k * split))
        if warps_k * split <= chunks and (split - 1) * warps_k * steps < chunks:
            warps = -(-tiles * split // gpu.multiprocessors) * warps_k
            yield Cut(warps_k, split, steps, warps)


# What the registers of a multiprocessor hold: of warps that load two chunks ahead, and of others.
FEW_WARPS, MANY_WARPS = 12, 16
_FEW = DecodeLaunch(2, 1, 2, 144), DecodeLaunch(2, 1, 2, 168)
_MANY = DecodeLaunch(2, 1, 1, 120), DecodeLaunch(4, 1, 1, 216)


def decode_rule(gpu: Gpu, n: int, chunks: int) -> DecodeSettings:
    """Settings of `decode` for a shape that nobody measured.

    10 to 12 warps per multiprocessor that load two chunks ahead are best, then up to 16 that load
    one; all of them run at once. Of the cuts that give so many, the one whose warps have the fewest
    steps to do, where adding up costs a sixteenth of a step per part. Where even uncut rows give
    more warps, nothing is cut.
    """

    def cost(cut: Cut) -> tuple[float, int, int]:
        return cut.steps + cut.split / 16, cut.warps, cut.warps_k

    found = list(cuts(gpu, n, chunks, warps_per_program=(1, 2), most_parts=16))
    few = min((each for each in found if each.warps <= FEW_WARPS), key=cost, default=None)
    many = [each for each in found if FEW_WARPS < each.warps <= MANY_WARPS]
    if few and (few.warps >= 10 or not many):
        return DecodeSettings(few.warps_k, few.split, *_FEW)
    if many:
        best = min(many, key=cost)
        return DecodeSettings(best.warps_k, best.split, *_MANY)
    return DecodeSettings(1, 1, *_MANY)


# Elements below which a weight has too few tiles of 128 x 256 to fill an H200 up to 256 tokens, and
# with any number.
_MEDIUM_ON_HOPPER, _SMALL_ON_HOPPER = 30_000_000, 20_000_000
# One warp's tile of a matrix instruction without asynchrony; shared memory of SM86 holds two.
_AMPERE_FUSED = (FusedSettings(128, rows=128, tokens=32, warps=4, stages=2, per_multiprocessor=2),)


def hopper_rule(gpu: Gpu, n: int, k: int) -> tuple[FusedSettings, ...]:
    """Settings for a weight [N, K] that was not measured, for ever more tokens.

    They follow those that were, and eight shapes besides. Two programs at once with more of x and W
    in flight are better than three where parts are short, or tiles just fill the GPU that way.
    """
    slots = 2 * gpu.multiprocessors
    small = n * k < _SMALL_ON_HOPPER
    up_to_32 = FusedSettings(32, rows=64, tokens=32, warps=4, stages=5, per_multiprocessor=3)
    if small or BUSY * slots <= -(-n // 64) <= slots:
        up_to_64 = FusedSettings(64, rows=64, tokens=64, warps=4, stages=4, per_multiprocessor=2)
    else:
        up_to_64 = FusedSettings(64, rows=64, tokens=64, warps=4, stages=3, per_multiprocessor=3)
    limit = 256 if n * k < _MEDIUM_ON_HOPPER else 128
    more = FusedSettings(limit, rows=64, tokens=128, warps=4, stages=3, per_multiprocessor=2)
    if small:
        return up_to_32, up_to_64, more
    most = FusedSettings(
        FUSED_LIMIT, 128, 256, warps=8, stages=3, per_multiprocessor=1, prefetch=True
    )
    return up_to_32, up_to_64, more, most


@functools.cache
def _fused_table(gpu: Gpu, n: int, k: int) -> tuple[FusedSettings, ...]:
    """The steps of `fused`, as far as elements of y [tokens, N] can be counted in 32 bits."""
    steps = _fused_of(_entry(gpu, n, k))
    if not steps:
        steps = hopper_rule(gpu, n, k) if gpu.is_hopper else _AMPERE_FUSED
    most = (2**31 - 1) // n
    within = [each for each in steps if each.up_to < most]
    if len(within) == len(steps):
        return steps
    return *within, replace(steps[len(within)], up_to=most)


def fused_limit(weight: RuntimeWeight, device: torch.device) -> int:
    """Most tokens that `fused` is faster for than dequantizing, at most FUSED_LIMIT."""
    return _fused_table(gpu_of(device), *weight.shape)[-1].up_to


def fused_settings(weight: RuntimeWeight, tokens: int, device: torch.device) -> FusedSettings:
    """Settings of `fused` for a weight and a number of tokens up to `fused_limit`."""
    steps = _fused_table(gpu_of(device), *weight.shape)
    return next((each for each in steps if tokens <= each.up_to), steps[-1])


def fused_buckets(weight: RuntimeWeight, device: torch.device) -> tuple[int, ...]:
    """The greatest number of tokens for each of the settings of `fused`."""
    return tuple(each.up_to for each in _fused_table(gpu_of(device), *weight.shape))
