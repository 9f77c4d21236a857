# SPDX-License-Identifier: Apache-2.0
"""The time of our op beside that of BF16, each with its error.

On a GPU calls are timed by replaying CUDA graphs over copies of the weight that no cache holds
(`kernels.timing`). On a CPU our op is the plain torch that serves as the kernels' oracle: its times
say nothing about a kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from vllm_nanoquant.bench.layers import Layer
from vllm_nanoquant.kernels.accuracy import relative_error
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.ops import w4a16, warm_up
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.kernels.timing import (
    Call,
    Timer,
    Times,
    copies_needed,
    time_in_graph,
)
from vllm_nanoquant.quantize.minmax import quantize_minmax

WHAT = (
    "microseconds of one call y [M, N] = x [M, K] bf16 times a weight [N, K]; error: mean "
    "|y - expected| / mean |expected|, expected being the fp64 product of the weights that the "
    "contestant holds; int4_error: the same against the fp64 product of the BF16 weights"
)
PLAIN_TORCH = (
    "a CPU: our op is plain torch there, the oracle of the kernels; these times say nothing about "
    "a kernel"
)
_SEED = 0
_DEVIATION = 0.02


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        layer: name of the shape.
        n, k: output and input features.
        tokens: M.
        contestant: ours or bf16.
        us, us_least, us_greatest: microseconds of one call: median, fastest, slowest.
        error: against what the contestant holds.
        int4_error: against the BF16 weights; of random ones, which are harder than a model's.
    """

    layer: str
    n: int
    k: int
    tokens: int
    contestant: str
    us: float
    us_least: float
    us_greatest: float
    error: float
    int4_error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The figure as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Contestant:
    """A form of the weight.

    Attributes:
        name: what results call it.
        calls: one per copy of the weight, given x.
        exact: what it multiplies by, fp64 [N, K].
    """

    name: str
    calls: Callable[[torch.Tensor], list[Call]]
    exact: torch.Tensor


def measure_layer(
    layer: Layer,
    tokens: Sequence[int],
    group_size: int,
    replays: int,
    device: torch.device,
    timer: Timer | None = None,
) -> Iterator[Row]:
    """Time both contestants at each number of tokens, one after the other.

    Args:
        layer: the weight's shape.
        tokens: numbers of tokens.
        group_size: weights per scale, -1 for a whole row.
        replays: how often a call is timed.
        device: a GPU or the CPU.
        timer: what times; None takes CUDA graphs or the clock, by the device.

    Raises:
        torch.OutOfMemoryError: the copies of the weight do not fit.
    """
    timer = timer or (time_in_graph if device.type == "cuda" else time_by_clock)
    random = torch.Generator(device).manual_seed(_SEED)
    dense = torch.randn(layer.n, layer.k, generator=random, dtype=torch.bfloat16, device=device)
    dense.mul_(_DEVIATION)
    exact = dense.double()
    contestants = [_ours(dense, group_size), _bf16(dense, exact)]
    for count in tokens:
        x = torch.randn(count, layer.k, generator=random, dtype=torch.bfloat16, device=device)
        for contestant in contestants:
            calls = contestant.calls(x)
            y = calls[0]()
            times = timer(calls, replays)
            ours = contestant.name == "ours"
            yield _row(
                layer,
                count,
                contestant.name,
                times,
                relative_error(y, x, contestant.exact),
                relative_error(y, x, exact) if ours else None,
            )


def _ours(dense: torch.Tensor, group_size: int) -> _Contestant:
    source = quantize_minmax(dense, group_size)
    weight = RuntimeWeight.from_quantized(source)
    warm_up(weight, dtype=dense.dtype)
    copies = [weight, *(weight.clone() for _ in range(_more_copies(weight.nbytes, dense.device)))]
    return _Contestant(
        "ours",
        lambda x: [partial(w4a16, x, copy) for copy in copies],
        dequantize(source, dtype=torch.float64),
    )


def _bf16(dense: torch.Tensor, exact: torch.Tensor) -> _Contestant:
    product = torch.nn.functional.linear
    copies = [dense, *(dense.clone() for _ in range(_more_copies(dense.nbytes, dense.device)))]
    return _Contestant("bf16", lambda x: [partial(product, x, copy) for copy in copies], exact)


def _more_copies(nbytes: int, device: torch.device) -> int:
    """Copies beside the first; on a CPU none, where memory is short and little is learnt."""
    return copies_needed(nbytes) - 1 if device.type == "cuda" else 0


def time_by_clock(calls: Sequence[Call], replays: int) -> Times:
    """Time calls on a CPU, one round over all of them per figure, in microseconds."""
    for call in calls:
        call()
    figures = []
    for _ in range(replays):
        begin = time.perf_counter()
        for call in calls:
            call()
        figures.append((time.perf_counter() - begin) * 1e6 / len(calls))
    return Times(statistics.median(figures), min(figures), max(figures))


def _row(
    layer: Layer,
    tokens: int,
    name: str,
    times: Times,
    error: float,
    int4_error: float | None,
) -> Row:
    return Row(
        layer=layer.name,
        n=layer.n,
        k=layer.k,
        tokens=tokens,
        contestant=name,
        us=round(times.median, 2),
        us_least=round(times.least, 2),
        us_greatest=round(times.greatest, 2),
        error=float(f"{error:.3g}"),
        int4_error=None if int4_error is None else float(f"{int4_error:.3g}"),
    )
