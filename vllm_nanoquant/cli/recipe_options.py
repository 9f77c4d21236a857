# SPDX-License-Identifier: Apache-2.0
"""Options of a recipe that several commands take."""

import argparse
from typing import Any


def add_scheme(group: Any, presets: str = "ssm, balanced (default), quality or full") -> None:
    """Add which kinds of modules become int4, and in what groups.

    Args:
        group: of argparse.
        presets: help of ``--preset``.
    """
    group.add_argument("--preset", help=presets)
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale: 32, 64, 128 (default), or -1 for a whole row",
    )


def add_patterns(group: Any) -> None:
    """Add exceptions from the preset, by patterns."""
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these modules as they are: a name, shell wildcards, or re:REGEX; repeatable",
    )
    group.add_argument(
        "--override",
        action="append",
        default=[],
        type=override_option,
        metavar="PATTERN=BITS[/GROUP]",
        help="treat these modules otherwise: 4/32, 4 or 16; the last match wins; repeatable",
    )


def override_option(text: str) -> tuple[str, dict[str, int]]:
    """``PATTERN=4/32`` as pattern and override, for argparse; the recipe judges the numbers.

    Raises:
        argparse.ArgumentTypeError: not of this form.
    """
    pattern, found, value = text.rpartition("=")
    bits, has_group, group = value.partition("/")
    try:
        override = {"bits": int(bits)} | ({"group_size": int(group)} if has_group else {})
    except ValueError:
        found = ""
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATTERN=4/32 or PATTERN=16")
    return pattern, override
