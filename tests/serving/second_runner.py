# SPDX-License-Identifier: Apache-2.0
"""vLLM's second model runner without a GPU: its Triton kernels in Triton's interpreter.

From 0.29 on hybrids run on it by default where there is Triton. vLLM for CPUs has it, too (0.32),
but takes Triton only with a backend for CPUs, which the package does not bring.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def prepare() -> None:
    """Have vLLM find Triton and interpret it; before anything imports either."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    try:
        import vllm.triton_utils.importing  # noqa: F401  # looks for backends once
    finally:
        del backends["cpu"]  # PyTorch would take it for a compiler
    _mend_interpreter()


def _mend_interpreter() -> None:
    """What a GPU does and the interpreter does not, as far as vLLM's kernels need it."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    def with_boolean_mask(method: Callable[..., Any], position: int) -> Callable[..., Any]:
        """A load or store whose mask may be of another type than bool."""

        def mended(builder: object, *given: Any) -> Any:
            arguments = list(given)
            mask = arguments[position]
            if mask is not None and mask.data.dtype != np.bool_:
                arguments[position] = TensorHandle(mask.data.astype(np.bool_), mask.dtype)
            return method(builder, *arguments)

        return mended

    builder: Any = InterpreterBuilder
    builder.create_masked_load = with_boolean_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_boolean_mask(builder.create_masked_store, 2)
    min_max: Callable[..., Any] = ReduceOps.min_max

    def of_any_values(
        self: Any, data: Any, val_reduce_op: Any = None, idx_reduce_op: Any = None
    ) -> Any:
        """A maximum that takes a row of NaN, as the logits of vLLM's profiling are."""

        def index_of(values: Any, **rest: Any) -> Any:
            least = -np.inf if idx_reduce_op is np.nanargmax else np.inf
            if values.dtype.kind == "f":
                values = np.where(np.isnan(values), least, values)
            return idx_reduce_op(values, **rest)

        return min_max(self, data, val_reduce_op, index_of if idx_reduce_op else None)

    reduce_ops: Any = ReduceOps
    reduce_ops.min_max = of_any_values
