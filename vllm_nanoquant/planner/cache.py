# SPDX-License-Identifier: Apache-2.0
"""vLLM's cache of a hybrid model: pages, blocks, and how many sequences they hold.

vLLM (0.26 to 0.33) cuts all of its cache memory into blocks of one size. A block of an attention
layer holds keys and values of some tokens, a block of a Mamba layer one state, so a page (a block
in one layer) is made as large as the larger of the two: attention gets so many tokens, a multiple
of 16, that its page is no smaller than a state, and a state is padded to that. Layers of both kinds
are put in groups of equally many, and a block is a page in each layer of a group:

    9B: 4 attention layers, 27 Mamba layers -> groups of 4: 1 of attention, 7 of Mamba
        page 1312 tokens x 4096 bytes, for a state of 5,316,608; block 4 pages, 21.5 MB
        a sequence of L tokens: ceil(L / 1312) + 7 blocks
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.mixers import Attention, Mamba
from vllm_nanoquant.planner.numbers import split

TOKENS_STEP = 16
"""Tokens of a block are a multiple of it."""
SSM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_BYTES = {
    "auto": 2, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1,
}  # fmt: skip
_UNEVEN = 1.5  # Up to this ratio of layers, vLLM pads the fewer instead of splitting the more.


@dataclass(frozen=True)
class PrefixCaching:
    """How many states a sequence needs in a Mamba layer.

    Attributes:
        on: whether prefixes are cached.
        states: blocks per group of Mamba layers; None for one every block of tokens.
    """

    on: bool
    states: int | None = 1


@dataclass(frozen=True)
class Cache:
    """The cache of one rank.

    Attributes:
        block_tokens: tokens of a block of attention; 0 for a model without attention.
        page_bytes: of a block in one layer.
        group_layers: layers of a group.
        attention_groups: groups of attention layers.
        mamba_groups: groups of Mamba layers.
        token_bytes: keys and values of one token in all attention layers, without padding.
        state_bytes: one sequence's states in all Mamba layers, without padding.
        states: blocks that a sequence takes in a group of Mamba layers; None: one every
            `block_tokens`.
    """

    block_tokens: int
    page_bytes: int
    group_layers: int
    attention_groups: int
    mamba_groups: int
    token_bytes: int
    state_bytes: int
    states: int | None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers of a group."""
        return self.page_bytes * self.group_layers

    def blocks_of(self, length: int) -> int:
        """Blocks that a sequence of so many tokens takes."""
        along = split(length, self.block_tokens) if self.block_tokens else 0
        states = along if self.states is None else self.states
        return self.attention_groups * along + self.mamba_groups * states

    def blocks_in(self, nbytes: int) -> int:
        """Blocks that so many bytes give; one is vLLM's own and holds nothing."""
        return max(0, nbytes // self.block_bytes - 1)

    def sequences(self, blocks: int, length: int) -> int:
        """Sequences of so many tokens that fit at once."""
        return blocks // self.blocks_of(length)

    def longest(self, blocks: int, sequences: int, most: int) -> int:
        """Tokens that each of so many sequences can have at once, up to `most`; 0 for none."""
        own = blocks // sequences
        if own < self.blocks_of(1):
            return 0
        if not self.block_tokens:
            return most
        if self.states is None:
            along = own // (self.attention_groups + self.mamba_groups)
        else:
            along = (own - self.mamba_groups * self.states) // self.attention_groups
        return min(most, along * self.block_tokens)


def cache_of(
    attention: Attention | None,
    mamba: Mamba | None,
    ranks: int,
    kv_bytes: int,
    ssm_bytes: int,
    prefixes: PrefixCaching,
    chunk: int = 128,
) -> Cache:
    """The cache that vLLM makes for a model.

    Args:
        attention: its attention layers.
        mamba: its Mamba layers.
        ranks: tensor-parallel ranks.
        kv_bytes: of a number of keys and values.
        ssm_bytes: of a number of the recurrent state.
        prefixes: whether prefixes are cached.
        chunk: tokens of a chunk of the Mamba kernels.

    Raises:
        PlanError: the model has neither kind of layers.
    """
    token = attention.token_bytes(ranks, kv_bytes) if attention else 0
    state = mamba.state_bytes(ranks, ssm_bytes) if mamba else 0
    attention_layers = attention.layers if attention else 0
    mamba_layers = mamba.layers if mamba else 0
    counts = [count for count in (attention_layers, mamba_layers) if count]
    if not counts:
        raise PlanError("a model without attention and Mamba layers cannot be planned")
    group = max(counts) if max(counts) < _UNEVEN * min(counts) else min(counts)
    tokens = 0
    if attention:
        # With a state for every block of tokens, blocks end where the kernels' chunks do.
        step = lcm(chunk, TOKENS_STEP) if prefixes.states is None and mamba else TOKENS_STEP
        tokens = step * max(1, split(state, step * token))
    return Cache(
        block_tokens=tokens,
        page_bytes=tokens * token if attention else state,
        group_layers=group,
        attention_groups=split(attention_layers, group),
        mamba_groups=split(mamba_layers, group),
        token_bytes=token * attention_layers,
        state_bytes=state * mamba_layers,
        states=prefixes.states,
    )
