# SPDX-License-Identifier: Apache-2.0
"""Quantizing one weight on every core, and measuring what it cost.

Rows do not depend on each other, so a block of them is one core's work from start to end. torch's
own threads meet after every operation instead, and on a machine that does something else as well
they mostly wait for each other: six times slower where two cores were shared.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from vllm_nanoquant.checkpoint.fidelity import error_of, relative_error, squared_norms
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.quantize.groups import QuantizedWeight, group_count
from vllm_nanoquant.recipe import Scheme

# Some 25 MB of temporaries for each core.
_BLOCK_WEIGHTS = 1 << 20
_MAX_WORKERS = 16


class RowQuantizer:
    """Quantizes weights on a device. As a context it holds threads, each with one of torch's."""

    def __init__(self, device: torch.device) -> None:
        """Prepare for `device`; a GPU gets whole weights, the CPU blocks of rows."""
        self._device = device
        self._threads_before = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cpu":
            workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
            self._pool = ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads_before)

    def __call__(self, weight: torch.Tensor, scheme: Scheme) -> tuple[QuantizedWeight, float]:
        """Quantize W [N, K]; return it with its relative error.

        The bytes are those of quantizing the weight at once.

        Raises:
            ValueError: as `quantize.algorithms.quantize`.
        """
        rows, columns = weight.shape
        step = max(1, _BLOCK_WEIGHTS // columns)
        if self._pool is None:
            quantized = quantize(weight, *scheme, self._device)
            return quantized, relative_error(weight, quantized)
        packed = torch.empty(((columns + 1) // 2, rows), dtype=torch.uint8)
        groups = group_count(columns, scheme.group_size)
        scale = torch.empty((groups, rows), dtype=torch.bfloat16)
        zero_point = torch.empty_like(scale)

        def work(start: int) -> torch.Tensor:
            block = slice(start, start + step)
            part = quantize(weight[block], *scheme, self._device)
            packed[:, block], scale[:, block] = part.packed, part.scale
            zero_point[:, block] = part.zero_point
            return squared_norms(weight[block], part)

        try:
            norms = sum(self._pool.map(work, range(0, rows, step)), torch.zeros(2).double())
        except ValueError:
            # The same again on the whole weight, whose error counts rows from its first one.
            quantize(weight, *scheme, self._device)
            raise
        whole = QuantizedWeight(packed, scale, zero_point, scheme.group_size, columns)
        return whole, error_of(norms)
