# SPDX-License-Identifier: Apache-2.0
"""A model's weights as one rank holds them: what part of the model each is, and its bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_nanoquant.checkpoint.errors import printable
from vllm_nanoquant.checkpoint.naming import ORDER, PACKED, SCALE, ZERO_POINT, is_routed_expert
from vllm_nanoquant.checkpoint.stored import require_known_version
from vllm_nanoquant.kernels.layout import ARRIVALS_PER_BLOCK, padded, runtime_shapes
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.mixers import Mamba
from vllm_nanoquant.planner.numbers import split
from vllm_nanoquant.planner.source import Facts
from vllm_nanoquant.quantize.groups import WHOLE_ROW
from vllm_nanoquant.recipe import METHOD
from vllm_nanoquant.roles import Role, role_of

BF16_BYTES = 2
_WORD_BYTES = 4
_VOCABULARY_PADDING = 64  # vLLM pads the vocabulary of each rank to a multiple of it.


class Part(StrEnum):
    """A kind of weights, as the plan's table lists them."""

    MAMBA = "Mamba projections"
    MLP = "MLP"
    EXPERTS = "routed experts"
    SHARED = "shared experts"
    ATTENTION = "attention"
    LM_HEAD = "LM head"
    EMBEDDING = "embedding"
    OTHER = "norms, convolutions, routers"


@dataclass(frozen=True)
class Weight:
    """Matrices of one shape as one rank holds them, or a tensor that is no matrix.

    Attributes:
        module: the checkpoint's name.
        part: what it belongs to.
        count: how many matrices: 1, or a layer's experts where they lie in one tensor.
        rows: N; all elements of what is no matrix.
        columns: K; 1 of what is no matrix.
        whole: elements of the tensor, on all ranks together.
        first_columns: where each rank's share of the columns begins.
    """

    module: str
    part: Part
    count: int
    rows: int
    columns: int
    whole: int
    first_columns: tuple[int, ...] = (0,)

    @property
    def numel(self) -> int:
        """Elements on one rank."""
        return self.count * self.rows * self.columns

    @property
    def is_fused(self) -> bool:
        """Whether it is all experts of a layer in one tensor."""
        return self.part is Part.EXPERTS and not is_routed_expert(self.module)

    @property
    def bf16_bytes(self) -> int:
        """Bytes as they are, in bfloat16."""
        return self.numel * BF16_BYTES

    def int4_bytes(self, group_size: int) -> int:
        """Bytes in the layout of the kernels: integers, scales and zero points, padded."""
        offsets = {0 if group_size == WHOLE_ROW else c % group_size for c in self.first_columns}
        sizes = []
        for offset in offsets:
            shapes = runtime_shapes(self.rows, self.columns, group_size, offset)
            nbytes = sum(map(math.prod, shapes)) * _WORD_BYTES
            if self.part is not Part.EXPERTS:
                blocks, _ = padded(self.rows, self.columns, offset)
                nbytes += blocks * ARRIVALS_PER_BLOCK * _WORD_BYTES
            sizes.append(nbytes)
        return self.count * max(sizes)


@dataclass(frozen=True)
class Ranks:
    """How a model is spread over GPUs.

    Attributes:
        count: tensor-parallel ranks.
        expert_parallel: whether each has whole experts instead of a cut of every one.
    """

    count: int = 1
    expert_parallel: bool = False


ONE_GPU = Ranks()


def weights_of(facts: Facts, mamba: Mamba | None, ranks: Ranks) -> list[Weight]:
    """Weights that one rank holds of a model, the embedding included.

    Args:
        facts: the model.
        mamba: its Mamba layers.
        ranks: how it is spread.

    Raises:
        PlanError: the checkpoint is quantized in another format than ours.
    """
    _require_plannable(facts)
    found = []
    for name, entry in facts.tensors.items():
        if name.startswith(_NOT_SERVED):
            continue
        if name.endswith((SCALE, ZERO_POINT, ORDER)) and _packed_beside(name, facts.tensors):
            continue
        shape = tuple(entry["shape"])
        module = name.removesuffix(".weight")
        if name.endswith(PACKED):
            module, shape = name.removesuffix(PACKED), (shape[1], 2 * shape[0])
        found.append(_weight(module, shape, mamba, ranks))
    return found


def _require_plannable(facts: Facts) -> None:
    config = facts.whole_config.get("quantization_config")
    if facts.is_int4 and isinstance(config, Mapping):
        require_known_version(config["format_version"])
        return
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    by_name = next((name for name in facts.tensors if name.endswith(_QUANTIZED_ENDINGS)), None)
    if by_name is None and method in (None, "", METHOD):
        return
    raise PlanError(
        f"{printable(facts.name)} is quantized by another tool "
        f"({printable(str(method or by_name))}); plan the model that it was made from, or run "
        "'nanoquant convert' first and plan the result"
    )


_NOT_SERVED = ("mtp.",)  # vLLM drops the layers that predict further tokens.
_QUANTIZED_ENDINGS = (".qweight", ".W_q", ".weight_packed", ".weight_scale", ".weight_scale_inv")


def _packed_beside(name: str, tensors: Mapping[str, object]) -> bool:
    return name.rpartition(".")[0] + PACKED in tensors


def _weight(module: str, shape: tuple[int, ...], mamba: Mamba | None, ranks: Ranks) -> Weight:
    whole = math.prod(shape)
    part = part_of(module, shape)
    if len(shape) == 3 and part is Part.EXPERTS:
        count, rows, columns = shape
    elif len(shape) == 2 and (part is not Part.OTHER):
        count, (rows, columns) = 1, shape
    else:
        return Weight(module, part, 1, _vector(module, whole, ranks), 1, whole)
    if part is Part.EXPERTS and ranks.expert_parallel:
        return Weight(module, part, _own_experts(module, count, ranks), rows, columns, whole)
    leaf = module.rpartition(".")[2]
    firsts: tuple[int, ...] = (0,)
    if part in (Part.EMBEDDING, Part.LM_HEAD):
        rows = split(split(rows, _VOCABULARY_PADDING) * _VOCABULARY_PADDING, ranks.count)
    elif leaf in _ROW_PARALLEL:
        columns = split(columns, ranks.count)
        firsts = tuple(rank * columns for rank in range(ranks.count))
    elif leaf == "in_proj" and mamba is not None:
        rows = mamba.in_proj_rows(ranks.count)
    else:
        rows = split(rows, ranks.count)
    return Weight(module, part, count, rows, columns, whole, firsts)


def _own_experts(module: str, count: int, ranks: Ranks) -> int:
    """Experts of a tensor that the first rank has: the first of so many in each layer."""
    found = _EXPERT.search(module)
    if found is None:
        return split(count, ranks.count)
    return int(int(found[1]) % ranks.count == 0)


_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROW_PARALLEL = frozenset(
    {"out_proj", "down_proj", "o_proj", "output_linear", "dense", "w2", "linear"}
)
_SPLIT_VECTOR = re.compile(r"\.(?:mixer|mamba)\.(?:A_log|D|dt_bias|conv1d(?:\.bias)?|norm)$")
_EMBEDDINGS = frozenset({"embeddings", "embed_tokens", "wte", "word_embeddings"})


def _vector(module: str, count: int, ranks: Ranks) -> int:
    """Elements that a rank has of what is no projection: Mamba's vectors are split by heads."""
    return split(count, ranks.count) if _SPLIT_VECTOR.search(module) else count


def part_of(module: str, shape: tuple[int, ...]) -> Part:
    """What part of the model a tensor belongs to."""
    leaf = module.rpartition(".")[2]
    if leaf in _EMBEDDINGS:
        return Part.EMBEDDING
    if len(shape) == 3 and (is_routed_expert(module) or "block_sparse_moe" in module):
        return Part.EXPERTS
    role = role_of(module)
    if role is None or len(shape) != 2:
        return Part.OTHER
    if is_routed_expert(module):
        return Part.EXPERTS
    if "shared_expert" in module:
        return Part.SHARED
    return _PARTS[role]


_PARTS = {
    Role.MAMBA: Part.MAMBA,
    Role.MLP: Part.MLP,
    Role.ATTENTION: Part.ATTENTION,
    Role.LM_HEAD: Part.LM_HEAD,
}
