# SPDX-License-Identifier: Apache-2.0
"""The method for routed experts that are int4 in the checkpoint.

Each expert has the tensors of a linear layer (``stored_linear.py``). Its three tensors of a weight
come one after the other, and when the third is there, the weight is laid out among the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from vllm_nanoquant.checkpoint.stored import Int4Module, require_shape
from vllm_nanoquant.layers.expert_parts import Cut
from vllm_nanoquant.layers.experts import Int4ExpertsMethod
from vllm_nanoquant.layers.sharding import column_share, stored_rows
from vllm_nanoquant.layers.stored_linear import INT4_TENSORS, require_finite
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.recipe import METHOD, RecipeError, Scheme


class StoredExpertsMethod(Int4ExpertsMethod):
    """Serves experts that are int4 in the checkpoint."""

    def __init__(
        self,
        layer: RoutedExperts,
        scheme: Scheme,
        prefix: str,
        ledger: Ledger,
        headers: Sequence[Int4Module] = (),
    ) -> None:
        """Make the method of one layer.

        Args:
            layer: the experts, as far as vLLM has built them.
            scheme: group size; the algorithm has done its work.
            prefix: vLLM's full name of the layer.
            ledger: keeps count of what has been loaded.
            headers: what the checkpoint's headers say of the experts' modules; empty where none
                could be read.

        Raises:
            RecipeError: an expert's columns are in an order of their own.
        """
        super().__init__(layer, scheme, prefix, ledger)
        self.headers = headers
        self._tensors: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        ordered = next((header.name for header in headers if header.ordered), None)
        if ordered is not None:
            raise RecipeError(
                f"{METHOD}: {ordered}.weight_order: the columns of routed experts cannot be in "
                "another order; quantize again without activation order, or keep the experts in "
                "BF16"
            )

    def _cuts(self, whole: int) -> dict[str, dict[str, Cut]]:
        last = self.leaves["w2"]
        for header in self.headers:
            is_last = header.name.rpartition(".")[2] == last
            shape = (self.hidden, whole) if is_last else (whole, self.hidden)
            require_shape([header], *shape, self.prefix)
        size = self.scheme.group_size
        all_inputs = stored_rows(column_share(self.hidden, self.hidden, 0, size), size)
        every = stored_rows(column_share(whole, whole, 0, size), size)
        read = stored_rows(self.columns, size)
        first = self.moe.tp_rank * self.intermediate
        return {
            tensor: {
                "w13": Cut((all_inputs[tensor][1], whole), 1, first, self.intermediate),
                "w2": Cut((every[tensor][1], self.hidden), 0, *read[tensor]),
            }
            for tensor in INT4_TENSORS
        }

    def _take(self, expert: int, number: int, shard: str, tensor: str, part: torch.Tensor) -> None:
        tensors = self._tensors.setdefault((expert, shard), {})
        tensors[tensor] = part
        if len(tensors) < len(INT4_TENSORS):
            return
        del self._tensors[expert, shard]
        packed, scale, zero_point = (
            tensors[name].to(self.device).contiguous() for name in INT4_TENSORS
        )
        for name, values in (("weight_scale", scale), ("weight_zero_point", zero_point)):
            require_finite(values, self._name(number, shard, name))
        columns = self.columns.columns_read if shard == "w2" else self.hidden
        weight = QuantizedWeight(packed, scale, zero_point, self.scheme.group_size, columns)
        self._add(expert, shard, weight)
