# SPDX-License-Identifier: Apache-2.0
"""How much memory a quantizer takes for a while."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestAllocation(TorchDispatchMode):
    """Most bytes alive at once in storages that were made while the mode was on."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage()._cdata
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            key = storage._cdata
            if key != self.given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result
