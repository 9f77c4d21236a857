# SPDX-License-Identifier: Apache-2.0
"""The command line of the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import output_file, positive
from benchmarks.kernels.layers import (
    GROUP_SIZE,
    LAYERS,
    QUICK_LAYERS,
    QUICK_TOKENS,
    TOKENS,
    Layer,
    parse_shape,
)
from benchmarks.kernels.peers import NAMES
from benchmarks.kernels.peers.base import GROUP_SIZES

REPLAYS = 9
QUICK_REPLAYS = 5


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        output: the JSON file to write; None: only print.
        layers: the weights.
        tokens: numbers of tokens, ascending.
        peers: names of contestants, of the read floor too.
        group_size: columns per scale that are asked of the contestants.
        replays: how often each graph is timed.
    """

    output: Path | None
    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    peers: tuple[str, ...]
    group_size: int
    replays: int


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; on a mistake, say what is wrong and exit with status 2."""
    found = _parser().parse_args(arguments)
    layers = found.layers
    if layers is None and not found.shapes:
        layers = tuple(LAYERS[name] for name in (QUICK_LAYERS if found.quick else LAYERS))
    return Options(
        output=found.output,
        layers=(*(layers or ()), *found.shapes),
        tokens=found.tokens or (QUICK_TOKENS if found.quick else TOKENS),
        peers=found.peers,
        group_size=found.group_size,
        replays=found.replays or (QUICK_REPLAYS if found.quick else REPLAYS),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="W4A16 kernels beside their rivals; lists are separated by commas."
    )
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--layers", type=_layers, help=f"default: {','.join(LAYERS)}")
    parser.add_argument(
        "--shapes", type=_shapes, default=(), help="NxK; alone, instead of the layers"
    )
    parser.add_argument("--tokens", type=_tokens, help=f"default: {','.join(map(str, TOKENS))}")
    parser.add_argument("--peers", type=_peers, default=NAMES, help=f"default: {','.join(NAMES)}")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=sorted(GROUP_SIZES),
        default=GROUP_SIZE,
        help="asked of every contestant; one that refuses it is asked for less (default: 128)",
    )
    parser.add_argument("--replays", type=positive, help=f"timed per figure (default: {REPLAYS})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"layers {','.join(QUICK_LAYERS)}, tokens {','.join(map(str, QUICK_TOKENS))}, "
        f"{QUICK_REPLAYS} replays, unless given",
    )
    return parser


def _layers(text: str) -> tuple[Layer, ...]:
    return tuple(LAYERS[name] for name in _names(text, "layer", tuple(LAYERS)))


def _peers(text: str) -> tuple[str, ...]:
    return _names(text, "peer", NAMES)


def _names(text: str, what: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The names in a list, each of them one of the choices, without repetition."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in choices:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a {what}; choose from {', '.join(choices)}"
            )
    return names


def _shapes(text: str) -> tuple[Layer, ...]:
    try:
        return tuple(parse_shape(shape.strip()) for shape in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _tokens(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(number.strip()) for number in text.split(",")}))
