# SPDX-License-Identifier: Apache-2.0
"""The int4 weights of a layer's experts, one behind the other in the layout of `layout.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nanoquant.kernels.layout import (
    ARRIVALS_PER_BLOCK,
    RuntimeWeight,
    groups_per_chunk,
    require_tensors,
    runtime_shapes,
)
from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight, validate_group


@dataclass(frozen=True)
class ExpertWeights:
    """E int4 weights [N, K] of one shape; shapes that do not fit together are refused.

    Attributes:
        words: int32 [E, ceil(N / 64), ceil((K + offset) / 128), 4, 256].
        scales: int32 [E, chunks or 1, tiles of 16 rows, 8, 2, groups per chunk].
        out_features: N.
        in_features: K.
        group_size: columns per group: 32, 64, 128 or WHOLE_ROW.
        group_offset: columns of the first group that lie before column 0 of these weights.
    """

    words: torch.Tensor
    scales: torch.Tensor
    out_features: int
    in_features: int
    group_size: int
    group_offset: int = 0

    def __post_init__(self) -> None:
        validate_group(self.group_size, self.group_offset)
        if min(self.out_features, self.in_features, len(self.words)) < 1:
            raise ValueError(f"{len(self.words)} experts {list(self.shape)} have no elements")
        words, scales = runtime_shapes(*self.shape, self.group_size, self.group_offset)
        require_tensors(
            f"experts {list(self.shape)} in groups of {self.group_size} with offset "
            f"{self.group_offset} need",
            words=(self.words, (len(self.words), *words)),
            scales=(self.scales, (len(self.words), *scales)),
        )

    @classmethod
    def empty(
        cls,
        experts: int,
        out_features: int,
        in_features: int,
        group_size: int,
        group_offset: int,
        device: torch.device,
    ) -> ExpertWeights:
        """Memory for E experts, to be filled with `put`."""
        words, scales = runtime_shapes(out_features, in_features, group_size, group_offset)
        return cls(
            torch.empty((experts, *words), dtype=torch.int32, device=device),
            torch.empty((experts, *scales), dtype=torch.int32, device=device),
            out_features,
            in_features,
            group_size,
            group_offset,
        )

    @property
    def experts(self) -> int:
        """E."""
        return len(self.words)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.out_features, self.in_features)

    @property
    def chunks(self) -> int:
        """Chunks of 128 columns, the padding counted."""
        return self.words.shape[2]

    @property
    def groups_per_chunk(self) -> int:
        """Groups that begin in a chunk: 4, 2 or 1."""
        return groups_per_chunk(self.group_size)

    @property
    def scale_stride(self) -> int:
        """Words of `scales` from one chunk to the next; 0 where all chunks share a row's group."""
        return 0 if self.group_size == WHOLE_ROW else self.scales.stride(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors together."""
        return self.words.nbytes + self.scales.nbytes

    def put(self, expert: int, weight: QuantizedWeight) -> None:
        """Lay out one expert's weight [N, K], which may be on another device.

        Raises:
            ValueError: its shape or its groups are not those of these experts.
        """
        own = (*self.shape, self.group_size, self.group_offset)
        if (*weight.shape, weight.group_size, weight.group_offset) != own:
            raise ValueError(
                f"expert {expert} is {list(weight.shape)} in groups of {weight.group_size} with "
                f"offset {weight.group_offset}; this layer's are {list(self.shape)} in groups of "
                f"{self.group_size} with offset {self.group_offset}"
            )
        laid_out = RuntimeWeight.from_quantized(weight)
        self.words[expert].copy_(laid_out.words)
        self.scales[expert].copy_(laid_out.scales)

    def expert(self, expert: int) -> RuntimeWeight:
        """One expert's weight; words and scales are shared with this object."""
        words = self.words[expert]
        arrivals = words.new_zeros(len(words) * ARRIVALS_PER_BLOCK)
        return RuntimeWeight(
            words, self.scales[expert], arrivals, *self.shape, self.group_size, self.group_offset
        )
