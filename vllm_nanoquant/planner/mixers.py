# SPDX-License-Identifier: Apache-2.0
"""The layers that remember: how many Mamba and attention layers there are, and of what size."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.numbers import count_of, split
from vllm_nanoquant.planner.source import Facts
from vllm_nanoquant.roles import LayerKind

_STATE_BF16 = 2


@dataclass(frozen=True)
class Mamba:
    """A model's Mamba-2 layers, all alike.

    Attributes:
        layers: their number.
        heads: H.
        head_dim: P.
        state: S.
        groups: of B and C.
        kernel: taps of the convolution.
    """

    layers: int
    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int

    @property
    def inner(self) -> int:
        """Width of the mixer: H * P."""
        return self.heads * self.head_dim

    def conv_rows(self, ranks: int) -> int:
        """Channels of the convolution on one rank; groups that do not divide are repeated."""
        groups = self.groups if self.groups % ranks == 0 else ranks
        return split(self.inner + 2 * groups * self.state, ranks)

    def in_proj_rows(self, ranks: int) -> int:
        """Rows of in_proj on one rank: gate, x, B, C and dt."""
        return split(self.inner, ranks) + self.conv_rows(ranks) + split(self.heads, ranks)

    def state_bytes(self, ranks: int, ssm_bytes: int) -> int:
        """Bytes of one sequence's state in one layer on one rank.

        Args:
            ranks: tensor-parallel ranks.
            ssm_bytes: of a number of the recurrent state; the convolution's is bfloat16.
        """
        conv = self.conv_rows(ranks) * (self.kernel - 1) * _STATE_BF16
        return conv + split(self.heads, ranks) * self.head_dim * self.state * ssm_bytes


@dataclass(frozen=True)
class Attention:
    """A model's attention layers, all alike.

    Attributes:
        layers: their number.
        heads: of queries.
        kv_heads: heads of keys, and of values.
        head_dim: numbers of a head.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, ranks: int, number_bytes: int) -> int:
        """Bytes of one token's keys and values in one layer on one rank."""
        return 2 * max(1, split(self.kv_heads, ranks)) * self.head_dim * number_bytes


def mamba_of(facts: Facts) -> Mamba | None:
    """The Mamba layers by the shapes of their tensors; None where there are none.

    Raises:
        PlanError: shapes or config.json contradict themselves.
    """
    convolutions = [
        (name, tuple(entry["shape"]))
        for name, entry in facts.tensors.items()
        if name.endswith("conv1d.weight")
    ]
    if not convolutions:
        return None
    config = facts.config
    name, shape = convolutions[0]
    heads_at = name.removesuffix("conv1d.weight") + "A_log"
    entry = facts.tensors.get(heads_at)
    groups = count_of(config, "n_groups", "mamba_n_groups", "mamba_ngroups", default=1)
    state = count_of(config, "ssm_state_size", "mamba_d_state")
    if entry is None or len(entry["shape"]) != 1 or len(shape) != 3:
        raise PlanError(f"{name} is not that of a Mamba-2 layer, which is all that can be planned")
    heads = entry["shape"][0]
    inner = shape[0] - 2 * groups * state
    if heads < 1 or inner < 1 or inner % heads or shape[2] < 2:
        raise PlanError(
            f"{name} is {list(shape)}, which does not fit {heads} heads and {groups} groups of "
            f"{state} by config.json"
        )
    return Mamba(len(convolutions), heads, inner // heads, state, groups, shape[2])


def attention_of(facts: Facts) -> Attention | None:
    """The attention layers by config.json; None where there are none.

    Raises:
        PlanError: config.json lacks what it needs, or the attention is of a kind that is not known.
    """
    config = facts.config
    if "kv_lora_rank" in config:
        raise PlanError(f"{facts.name} has latent attention, which cannot be planned")
    kinds = facts.kinds
    if kinds is not None:
        layers = sum(kind is LayerKind.ATTENTION for kind in kinds)
    else:
        layers = count_of(config, "num_hidden_layers")
    if layers == 0:
        return None
    heads = count_of(config, "num_attention_heads")
    head = count_of(
        config,
        "head_dim",
        "attention_head_dim",
        default=max(1, count_of(config, "hidden_size") // heads),
    )
    return Attention(layers, heads, count_of(config, "num_key_value_heads", default=heads), head)
