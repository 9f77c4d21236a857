# SPDX-License-Identifier: Apache-2.0
"""Memory of one GPU: what the weights leave, and how many sequences of what length fit there.

What vLLM takes besides weights and cache is measured by vLLM when it starts, with a forward pass of
`max_num_batched_tokens`. Here it is estimated from shapes; the constants were fitted to what vLLM
0.26 logged on an H200 (docs/planning.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_nanoquant.planner.mixers import Mamba
from vllm_nanoquant.planner.numbers import MIB, split
from vllm_nanoquant.planner.weights import BF16_BYTES, Part, Weight
from vllm_nanoquant.recipe import Scheme

ACTIVATION_CONSTANT = 970 * MIB
"""Of vLLM's peak, what does not depend on the number of tokens: it tunes kernels meanwhile."""
ACTIVATION_SHARE = 0.6
"""Share of the activations of the largest layer that the peak grows by with each token."""
CUBLAS_BYTES = 32 * MIB
"""cuBLAS's own workspace, which our warm-up allocates while the model is loaded."""
OUTSIDE_TORCH = 250 * MIB
"""What CUDA takes while vLLM starts: kernels, libraries."""
NCCL_BYTES = 400 * MIB
"""Buffers for talking to other GPUs."""
GRAPH_BYTES = 100 * MIB
"""CUDA graphs of the batch sizes that are captured by default."""
SCRATCH_BYTES = 200 * MIB
"""Most that our kernels dequantize into; as in ``kernels/prefill.py``, which needs Triton."""

_BLOCK = 512
_LARGE = 10 * MIB
_SEGMENT = 2 * MIB
_UNSPLIT = MIB
_NEVER_SPLIT = 20 * MIB


def allocated(nbytes: int) -> int:
    """Bytes that torch's allocator gives out for a tensor while vLLM loads.

    A large tensor gets a segment of whole 2 MiB, and a rest of up to 1 MiB is not split off; vLLM
    has nothing split off of 20 MiB and more.
    """
    rounded = -(-nbytes // _BLOCK) * _BLOCK
    if rounded < _LARGE:
        return rounded
    rest = -rounded % _SEGMENT
    return rounded + (rest if rest <= _UNSPLIT or rounded >= _NEVER_SPLIT else 0)


@dataclass(frozen=True)
class Needs:
    """Bytes of one GPU beside the cache.

    Attributes:
        weights: as they are served.
        rounding: what torch's allocator gives out beyond that.
        scratch: of our kernels, and cuBLAS's.
        activations: vLLM's peak during a forward pass.
        outside: what CUDA and NCCL take.
        graphs: CUDA graphs.
    """

    weights: int
    rounding: int
    scratch: int
    activations: int
    outside: int
    graphs: int

    @property
    def model(self) -> int:
        """What vLLM logs as "Model loading took"."""
        return self.weights + self.rounding + self.scratch

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.activations + self.outside + self.graphs


def needs_of(
    weights: Sequence[Weight],
    schemes: Mapping[str, Scheme],
    mamba: Mamba | None,
    tokens: int,
    ranks: int,
    top_k: int,
) -> Needs:
    """What one rank needs beside its cache.

    Args:
        weights: of the rank.
        schemes: of the modules that are int4.
        mamba: the Mamba layers.
        tokens: of the largest forward pass, ``max_num_batched_tokens``.
        ranks: number of ranks.
        top_k: experts of a token.
    """
    token = _token_bytes(weights, mamba, ranks, top_k)
    sizes = [served_bytes(weight, schemes.get(weight.module)) for weight in weights]
    return Needs(
        weights=sum(sizes),
        rounding=sum(map(allocated, sizes)) - sum(sizes) + _left_by_loading(weights, schemes),
        scratch=_scratch(weights, schemes),
        activations=ACTIVATION_CONSTANT + int(ACTIVATION_SHARE * tokens * token),
        outside=OUTSIDE_TORCH + (NCCL_BYTES if ranks > 1 else 0),
        graphs=GRAPH_BYTES,
    )


def served_bytes(weight: Weight, scheme: Scheme | None) -> int:
    """Bytes of a weight on one rank: int4 by a scheme, or bfloat16."""
    return weight.bf16_bytes if scheme is None else weight.int4_bytes(scheme.group_size)


def _left_by_loading(weights: Sequence[Weight], schemes: Mapping[str, Scheme]) -> int:
    """Bytes of int4 weights that lie in larger blocks than they need.

    A tensor of 20 MiB and more takes a free block whole that is up to 20 MiB larger, such as a BF16
    weight of another kind of layer has left behind, which then gets a new one.
    """
    linear = [w for w in weights if w.module in schemes and w.part is not Part.EXPERTS]
    integers = Counter(w.numel // 2 for w in linear)
    buffers = Counter(w.bf16_bytes for w in linear if w.part is not Part.LM_HEAD)
    left = 0
    for size, count in integers.items():
        larger = [b for b in buffers if size <= b < size + _NEVER_SPLIT]
        if size >= _NEVER_SPLIT and larger:
            left += (min(larger) - size) * min(count, buffers[min(larger)])
    return left


def _scratch(weights: Sequence[Weight], schemes: Mapping[str, Scheme]) -> int:
    """The buffer that prefill dequantizes into: as large as the largest weight, with a limit."""
    linear = [w for w in weights if w.module in schemes and w.part is not Part.EXPERTS]
    if not linear:
        return 0
    largest = max(w.bf16_bytes for w in linear)
    return min(largest, SCRATCH_BYTES) + CUBLAS_BYTES


def _token_bytes(weights: Sequence[Weight], mamba: Mamba | None, ranks: int, top_k: int) -> int:
    """Bytes of activations per token where a forward pass needs most."""
    hidden = next((w.columns for w in weights if w.part is Part.EMBEDDING), 0)
    widths = dict.fromkeys(Part, 0)
    for weight in weights:
        if weight.columns == hidden:
            widths[weight.part] = max(widths[weight.part], weight.rows)
    mixers = [2 * max(widths[Part.MLP], widths[Part.ATTENTION])]
    if mamba is not None:
        # in_proj's output, the convolution's input twice, and the mixer's output.
        conv, inner = mamba.conv_rows(ranks), split(mamba.inner, ranks)
        mixers.append(mamba.in_proj_rows(ranks) + 2 * conv + inner)
    if widths[Part.EXPERTS]:
        pair = 2 * (widths[Part.EXPERTS] + hidden)
        mixers.append(top_k * pair + 2 * widths[Part.SHARED])
    return BF16_BYTES * (max(mixers) + 3 * hidden)
