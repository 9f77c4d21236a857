# SPDX-License-Identifier: Apache-2.0
"""The practical limit: reading the packed integers of a weight once, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.kernels.peers.base import Refused, importable

# Words per program and warps; which is fastest depends on the size, so the fastest counts.
CONFIGURATIONS = ((2048, 2), (4096, 4), (4096, 8), (8192, 8), (16384, 8))
WORD_MULTIPLE = 16


@dataclass(frozen=True)
class PackedWords:
    """As many words as the integers of a weight [N, K] fill.

    Attributes:
        words: int32 [ceil(N * K / 8)], rounded up to 64 bytes.
        block: words that one program reads.
        warps: warps of a program.
    """

    words: torch.Tensor
    block: int
    warps: int

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.words.nbytes

    def copy(self) -> PackedWords:
        """The same words in other memory."""
        return replace(self, words=self.words.clone())

    def read(self) -> torch.Tensor:
        """Read all words: their sums modulo 2**32, int32 [programs]."""
        kernel = importable(f"{__name__}_kernel").read_kernel
        words = self.words.numel()
        programs = -(-words // self.block)
        sums = torch.empty(programs, dtype=torch.int32, device=self.words.device)
        kernel[(programs,)](self.words, sums, words, BLOCK=self.block, num_warps=self.warps)
        return sums

    def check(self) -> None:
        """Raise Refused unless `read` has read every word."""
        difference = self.read().sum(dtype=torch.int64) - self.words.sum(dtype=torch.int64)
        if int(difference) % (1 << 32):
            raise Refused("the sum of the words that it read is wrong")


def packed_words(n: int, k: int, device: torch.device) -> list[PackedWords]:
    """The words of a weight [N, K], random, to be read in each of CONFIGURATIONS."""
    count = -(-n * k // (8 * WORD_MULTIPLE)) * WORD_MULTIPLE
    words = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int32, device=device)
    return [PackedWords(words, block, warps) for block, warps in CONFIGURATIONS]
