# SPDX-License-Identifier: Apache-2.0
"""The contestants, one module each. Importing this imports none of them, nor torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.kernels.peers.base import Peer

CONTESTANTS = ("ours", "bf16", "marlin", "machete", "triton_w4a16", "humming", "gemlite")
# Reads the packed integers and multiplies nothing; measured once per layer.
FLOOR = "read_floor"
NAMES = (*CONTESTANTS, FLOOR)


def load(name: str) -> Peer:
    """The contestant of that name, one of CONTESTANTS; its module is named after it."""
    peer: Peer = import_module(f"{__name__}.{name}").PEER
    return peer
