# SPDX-License-Identifier: Apache-2.0
"""Asymmetric int4 with the range of each group chosen for the least squared error; no data needed.

Min-max spends its 16 levels on the two most extreme weights of a group. Giving those up by a little
makes every other weight more exact. For each group this module tries ranges on a grid, moves each
end on its own, fits scale and zero point to the integers by least squares, and keeps the best. The
error is that of the bf16 scale and zero point as they are stored. Min-max is one of the candidates.

All sums are trees of additions of whole tensors, in one fixed order, and every step is a single
correctly rounded operation: the same bytes come out on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from vllm_nanoquant.kernels.ops import launching_on
from vllm_nanoquant.quantize.groups import (
    WHOLE_ROW,
    QuantizedWeight,
    group_count,
    pack_nibbles,
)
from vllm_nanoquant.quantize.ranges import (
    STEPS,
    require_finite,
    scale_and_zero_point,
    validate_weight,
)

# Weights searched at a time by each thread of a CPU: enough that Python does not decide the speed.
# Temporaries take about 40 bytes per weight.
CHUNK_WEIGHTS_CPU = 1 << 19
# On a GPU.
CHUNK_WEIGHTS_GPU = 1 << 22

KERNEL_WIDTHS: tuple[int, ...] = (16, 32, 64, 128)
"""Columns of a group that the kernel of a GPU takes (`kernels.search`)."""

# The search, as fractions of the min-max range. More tries bring little: docs/algorithms.md.
_SHRINK = (0.93, 0.85, 0.77)
_MOVES = ((-0.09, -0.03, 0.03, 0.09), (-0.05, -0.02, 0.02, 0.05))
_FITS = 2
# Two of the 15 steps span the group: one, two or three evenly spaced values come back exactly.
_COARSE = STEPS / 2


def quantize_mse(
    weight: torch.Tensor,
    group_size: int,
    device: torch.device | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize W [N, K] (bf16, fp16 or fp32) on `device`, by default the one it is on.

    Minimises sum_k importance[k] * (w[k] - (q[k] + zero_point) * scale)^2 of each row and group. No
    group is worse in that measure, computed in fp64, than `quantize_minmax` makes it. Zero points
    that the search finds lie in [-15, 0], so that 0 stays inside the range.

    Args:
        weight: W [N, K]. On another device than `device` it is sent over in chunks, never whole.
        group_size: columns per group, the last one ragged where the size does not divide K.
        device: where to compute, and where the result lies.
        importance: weight of each input column's error, [K], at least 0; None for 1 everywhere.

    Returns:
        The quantized weight; the same bytes on every device. Temporaries: at most 32 MB for each
        thread of a CPU, 256 MB on a GPU (one row's worth if a row alone needs more).

    Raises:
        ValueError: another dtype, an empty weight, an unknown group size, weights that are not
            finite, or an importance of another shape, not finite, or negative.
    """
    validate_weight(weight, group_size)
    weight = weight.detach()
    rows, columns = weight.shape
    device = device or weight.device
    if importance is not None:
        importance = _normalised(importance, columns).to(device)
    groups = group_count(columns, group_size)
    packed = torch.empty(((columns + 1) // 2, rows), dtype=torch.uint8, device=device)
    scale = torch.empty((groups, rows), dtype=torch.bfloat16, device=device)
    zero_point = torch.empty_like(scale)

    def search(segment: _Segment, part: slice) -> None:
        weights = None if importance is None else importance[segment.columns]
        values = weight[part, segment.columns].to(device)
        out = (
            packed[segment.columns.start // 2 : (segment.columns.stop + 1) // 2, part],
            scale[segment.groups, part],
            zero_point[segment.groups, part],
        )
        if device.type == "cuda" and weights is None and segment.width in KERNEL_WIDTHS:
            _search_on_gpu(values, segment.width, *out)
            return
        q, part_scale, part_zero = _quantize_chunk(values, segment.width, weights)
        for whole, found in zip(out, (pack_nibbles(q), part_scale.t(), part_zero.t()), strict=True):
            whole.copy_(found)

    for segment in _segments(columns, group_size):
        _for_each_chunk(rows, segment, device, search)
    require_finite(weight, scale)
    return QuantizedWeight(packed, scale, zero_point, group_size, columns)


def _search_on_gpu(
    values: torch.Tensor,
    width: int,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
) -> None:
    """The search in one kernel: the same bytes, without temporaries."""
    from vllm_nanoquant.kernels.search import search

    if values.stride(1) != 1:
        values = values.contiguous()
    with launching_on(values.device):
        search(values, width, packed, scale, zero_point)


def _normalised(importance: torch.Tensor, columns: int) -> torch.Tensor:
    """An importance [K] in fp32 with 1 as its largest value. Raises ValueError if it is none."""
    if importance.shape != (columns,):
        raise ValueError(
            f"the importance has shape {list(importance.shape)}; {columns} columns need [{columns}]"
        )
    importance = importance.float()
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("the importance of a column must be finite and at least 0")
    largest = importance.max()
    return importance / largest if bool(largest > 0) else importance


class _Segment(NamedTuple):
    """Columns whose groups have one width: all full groups, or the ragged one."""

    columns: slice
    groups: slice
    width: int


def _segments(columns: int, group_size: int) -> list[_Segment]:
    width = columns if group_size == WHOLE_ROW else group_size
    full = columns // width
    segments = [_Segment(slice(0, full * width), slice(0, full), width)] if full else []
    if full * width < columns:
        ragged = slice(full * width, columns)
        segments.append(_Segment(ragged, slice(full, full + 1), columns - full * width))
    return segments


def _for_each_chunk(
    rows: int, segment: _Segment, device: torch.device, work: Callable[[_Segment, slice], None]
) -> None:
    """Call `work` for every chunk of the rows of a segment, on a CPU in as many threads as PyTorch.

    Chunks write to different parts of the result, and no result depends on how rows are cut. Each
    thread gets one of PyTorch's: those would wait for each other after every operation, which costs
    much where cores are shared.
    """
    on_cpu = device.type == "cpu"
    limit = CHUNK_WEIGHTS_CPU if on_cpu else CHUNK_WEIGHTS_GPU
    columns = segment.columns.stop - segment.columns.start
    chunk = max(1, limit // columns)
    parts = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    threads = torch.get_num_threads() if on_cpu and chunk * columns <= limit else 1
    if threads == 1:  # on a GPU the caller's own thread: another would have another stream
        for part in parts:
            work(segment, part)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(lambda part: work(segment, part), parts):
                pass
    finally:
        torch.set_num_threads(threads)


def _quantize_chunk(
    weight: torch.Tensor, width: int, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers uint8 [rows, C], scale and zero point bf16 [rows, C / width] of a weight [rows, C].

    Computed on [width, rows * G]: the sums over a group then add whole rows.
    """
    rows, columns = weight.shape
    groups = columns // width
    values = weight.float().view(rows, groups, width).permute(2, 0, 1).reshape(width, -1)
    if importance is not None:
        importance = importance.view(groups, width).t().repeat(1, rows)
    search = _Search(values, importance)
    search.run()
    q = _integers(values, search.scale, search.zero_point).to(torch.uint8)
    q = q.view(width, rows, groups).permute(1, 2, 0).reshape(rows, columns)
    scale = search.scale.to(torch.bfloat16).view(rows, groups)
    return q, scale, search.zero_point.to(torch.bfloat16).view(rows, groups)


class _Search:
    """The best scale and zero point so far of B groups; all tensors are fp32.

    Attributes:
        values: [g, B], one group per column.
        importance: [g, B], or None.
        scale: [B], a bf16 value.
        zero_point: [B], a bf16 value.
        error: [B], sum of the squared errors in units of the min-max scale.
    """

    def __init__(self, values: torch.Tensor, importance: torch.Tensor | None) -> None:
        self.values = values
        self.importance = importance
        self.low = values.amin(dim=0).clamp_(max=0.0)
        self.high = values.amax(dim=0).clamp_(min=0.0)
        scale, zero_point = scale_and_zero_point(self.low, self.high)
        self.minmax = (scale.float(), zero_point.float())
        self.scale, self.zero_point = self.minmax
        self.error = self._error(self.scale, self.zero_point)

    def run(self) -> None:
        """Try everything, then go back to min-max where in fp64 nothing was gained."""
        top = self.low + (self.high - self.low) * _COARSE
        self._offer(*scale_and_zero_point(self.low, top))
        ends = [torch.ones_like(self.low), torch.ones_like(self.high)]
        for fraction in _SHRINK:
            self._try_range(ends, [torch.full_like(end, fraction) for end in ends])
        for moves in _MOVES:
            for end in (0, 1):
                centre = list(ends)
                for move in moves:
                    moved = list(centre)
                    moved[end] = centre[end] + move
                    self._try_range(ends, moved)
        for _ in range(_FITS):
            self._offer(*self._fit())
        kept = self._exact_error(*self.minmax)
        worse = ~(self._exact_error(self.scale, self.zero_point) < kept)
        self.scale = torch.where(worse, self.minmax[0], self.scale)
        self.zero_point = torch.where(worse, self.minmax[1], self.zero_point)

    def _try_range(self, ends: list[torch.Tensor], tried: list[torch.Tensor]) -> None:
        """Offer the range [low * tried[0], high * tried[1]]; where it is taken, update `ends`."""
        scale, zero_point = scale_and_zero_point(self.low * tried[0], self.high * tried[1])
        taken = self._offer(scale, zero_point)
        for end in (0, 1):
            ends[end] = torch.where(taken, tried[end], ends[end])

    def _offer(self, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Keep this scale and zero point, bf16 [B], where they are better: bool [B]."""
        scale, zero_point = scale.float(), zero_point.float().clamp_(-STEPS, 0.0)
        error = self._error(scale, zero_point)
        taken = error < self.error
        self.error = torch.where(taken, error, self.error)
        self.scale = torch.where(taken, scale, self.scale)
        self.zero_point = torch.where(taken, zero_point, self.zero_point)
        return taken

    def _fit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, bf16, that fit the present integers best: w against q, a line."""
        q = _integers(self.values, self.scale, self.zero_point)
        weights = self.importance
        weighted = q.clone() if weights is None else q * weights
        # A tensor, not a number: see `scale_and_zero_point`.
        total = q.new_full((), len(q)) if weights is None else _fold(weights.clone())
        sum_w = _fold(self.values.clone() if weights is None else self.values * weights)
        sum_qw, sum_qq = _fold(weighted * self.values), _fold(weighted * q)
        sum_q = _fold(weighted)
        spread = total * sum_qq - sum_q * sum_q
        slope = (total * sum_qw - sum_q * sum_w) / spread
        scale = slope.to(torch.bfloat16)
        usable = (scale > 0) & torch.isfinite(scale)
        scale = torch.where(usable, scale, self.scale.to(torch.bfloat16))
        zero_point = (sum_w / scale.float() - sum_q) / total
        usable &= torch.isfinite(zero_point)
        zero_point = torch.where(usable, zero_point, self.zero_point)
        return scale, zero_point.to(torch.bfloat16)

    def _error(self, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Squared error of each group [B], in units of the square of the min-max scale."""
        wanted = (self.values / scale).sub_(zero_point)
        wanted.sub_(wanted.round().clamp_(0.0, STEPS))
        wanted.mul_(wanted)
        if self.importance is not None:
            wanted.mul_(self.importance)
        unit = scale / self.minmax[0]
        return _fold(wanted) * (unit * unit)

    def _exact_error(self, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Squared error of each group, fp64 [B]."""
        error = _integers(self.values, scale, zero_point).double()
        error.add_(zero_point.double()).mul_(scale.double()).sub_(self.values)
        error.mul_(error)
        if self.importance is not None:
            error.mul_(self.importance)
        return _fold(error)


def _integers(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Nearest integers of values [g, B], in fp32."""
    return (values / scale).sub_(zero_point).round_().clamp_(0.0, STEPS)


def _fold(terms: torch.Tensor) -> torch.Tensor:
    """Sum of [g, B] over g, [B], in a fixed order; `terms` is overwritten."""
    count = terms.shape[0]
    while count > 1:
        half = count // 2
        terms[:half] += terms[count - half : count]
        count -= half
    return terms[0]
