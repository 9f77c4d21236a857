# SPDX-License-Identifier: Apache-2.0
"""Triton: how a kernel overlaps with the one before it and the one after it (SM90 and later).

A kernel launched with `settings.launch_options` there may start while the one before it still runs.
Until it waits it may read what no kernel writes, the weights, and nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_kernel_before() -> None:
    """Wait until the kernel before has ended and its results are seen; let the next one start.

    In this order: so whatever starts early can rely on all but its direct predecessor, as kernels
    that PyTorch compiles for early starts do.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
