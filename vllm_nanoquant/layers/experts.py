# SPDX-License-Identifier: Apache-2.0
"""The methods for routed experts: their common part, and the one that quantizes while loading.

The experts of a layer are too much to stand anywhere in BF16 (2.55 GB for one layer of Nemotron 3
Nano 30B-A3B). So their parameters have a shape and no memory, not even when vLLM gives a layer's
parameters memory. vLLM collects what the checkpoint brings, as it does for linear layers, and hands
it over again when the layer is complete; then each expert is quantized by itself, straight into its
place among the int4 weights on the device. Experts that are int4 in the checkpoint take the same
road (``stored_experts.py``).

Over tensor-parallel ranks, the first product is split along N (gate and up each on their own), the
second along K, which may start inside a group (``sharding.py``). Over expert-parallel ranks, a rank
has whole experts, and skips those of others. Either way a rank's result is a part of a sum, and
vLLM's runner adds the parts up, because these methods have no kernel of vLLM's that would.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts

from vllm_nanoquant import compat
from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.moe import ACTIVATIONS, arrivals_needed, warm_up_experts
from vllm_nanoquant.layers.expert_parts import MATRICES, Cut, ExpertParts, matrix_of
from vllm_nanoquant.layers.linear import PROCESSED
from vllm_nanoquant.layers.sharding import ColumnShare, column_share
from vllm_nanoquant.layers.stored_linear import INT4_TENSORS
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight
from vllm_nanoquant.recipe import METHOD, Scheme

logger = compat.init_logger(__name__)

_DENSE = (torch.bfloat16, torch.float16, torch.float32)


class Int4ExpertsMethod(FusedMoEMethodBase):
    """Computes a mixture of int4 experts; a subclass says where their weights come from."""

    uses_meta_device = True
    """Tells vLLM's loaders that a layer is processed as soon as its weights are there."""
    columns: ColumnShare
    """What this rank reads of K of the second product, and keeps; known once the layer is built."""
    cuts: Mapping[str, Mapping[str, Cut]]
    """By a tensor's name in the checkpoint ("weight") and by matrix, the part of one shard of it
    that this rank reads."""

    def __init__(self, layer: RoutedExperts, scheme: Scheme, prefix: str, ledger: Ledger) -> None:
        """Make the method of one layer.

        Args:
            layer: the experts, as far as vLLM has built them. No reference to it is kept: vLLM has
                loaders in a table with the layers as weak keys.
            scheme: group size and algorithm, the same for all experts.
            prefix: vLLM's full name of the layer.
            ledger: keeps count of what is quantized.
        """
        super().__init__(layer.moe_config)
        self.scheme = scheme
        self.prefix = prefix
        self.ledger = ledger
        self.activation = layer.activation.value
        self.top_k = layer.top_k
        self.leaves = leaves_of(layer)
        gated = ACTIVATIONS[self.activation]
        self.shards = {"w13": ("w1", "w3") if gated else ("w1",), "w2": ("w2",)}
        self.dtype = torch.bfloat16
        self.device = torch.get_default_device()
        # Dummy weights never come through a loader, so there is nothing to count.
        self.counts_loads = get_current_vllm_config().load_config.load_format != "dummy"
        self._parts: ExpertParts | None = None

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: Any,
    ) -> tuple[int, int]:
        """Keep both sizes: no kernel of ours needs padded ones."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Nothing: it describes weights to vLLM's own kernels, and none of them is used."""
        return

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer what its checkpoint has for its experts, on the meta device.

        Raises:
            RecipeError: int4 tensors of the checkpoint have other shapes than the model.
        """
        self.dtype = params_dtype
        self.experts = num_experts
        self.hidden = hidden_size
        self.intermediate = intermediate_size_per_partition
        every = range(extra_weight_attrs["global_num_experts"])
        local = {expert: layer._map_global_expert_id_to_local_expert_id(expert) for expert in every}
        self.local_experts = {expert: here for expert, here in local.items() if here != -1}
        whole = intermediate_size_per_partition * self.moe.tp_size
        self.columns = column_share(
            whole, self.intermediate, self.moe.tp_rank, self.scheme.group_size
        )
        self.cuts = self._cuts(whole)
        for tensor, by_matrix in self.cuts.items():
            for matrix, cut in by_matrix.items():
                parameter = self._without_memory(cut, len(self.shards[matrix]))
                parameter.weight_loader = self.load_expert
                parameter.tensor = tensor
                layer.register_parameter(f"{matrix}_{tensor}", parameter)
        self.ledger.expect(self.prefix)
        compat.process_when_loaded(layer)

    @abstractmethod
    def _cuts(self, whole: int) -> dict[str, dict[str, Cut]]:
        """What the checkpoint has for one expert, `whole` being its width I on all ranks."""

    def _without_memory(self, cut: Cut, shards: int) -> Parameter:
        """Meta parameter for all experts whose elements all are one byte, also when it gets memory.

        vLLM makes such a parameter real with the strides that it has. It counts its elements to
        know when all are loaded. It never fills a boolean one with dummies.
        """
        byte = torch.empty(1, dtype=torch.bool, device="meta")
        shape = (self.experts, *cut.shape(shards))
        return Parameter(byte.expand(shape), requires_grad=False)

    def load_expert(
        self,
        param: Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load a tensor of one expert, or of several one behind the other; vLLM's `weight_loader`.

        Called twice. While `param` is on the meta device, vLLM only counts what is copied; later
        the tensor is quantized, and nothing is copied.

        Args:
            param: one of the layer's parameters.
            loaded_weight: the tensor as the checkpoint has it, whatever this rank needs of it; or
                the same of all experts of the model, or of this rank, with these in front.
            weight_name: the checkpoint's name of it, more or less.
            shard_id: w1, w2 or w3.
            expert_id: number of the expert in the model; no matter for several.
            return_success: whether to answer.

        Returns:
            Whether this rank has the expert, if asked.

        Raises:
            ValueError: the tensor has another shape or dtype than config.json and the recipe say,
                or cannot be quantized.
        """
        cut = self._cut_of(param.tensor, shard_id)
        if loaded_weight.dim() == len(cut.whole) + 1:
            numbers: Iterable[int] = range(len(loaded_weight))
            if len(loaded_weight) == self.experts:
                numbers = sorted(self.local_experts, key=self.local_experts.__getitem__)
            for number, weight in zip(numbers, loaded_weight, strict=True):
                self.load_expert(param, weight, weight_name, shard_id, number)
            return True if return_success else None
        expert = self.local_experts.get(expert_id)
        if expert is None:
            return False if return_success else None
        self._require_form(loaded_weight, param.tensor, shard_id, expert_id)
        part = cut.of(loaded_weight)
        if param.is_meta:
            torch.empty_like(part, device="meta").copy_(part)
        else:
            self._take(expert, expert_id, shard_id, param.tensor, part)
        return True if return_success else None

    def _names(self) -> list[str]:
        """Names of the layer's parameters that are loaded."""
        return [f"{matrix}_{tensor}" for tensor in self.cuts for matrix in MATRICES]

    def _cut_of(self, tensor: str, shard: str) -> Cut:
        return self.cuts[tensor][matrix_of(shard)]

    def _name(self, expert: int, shard: str, tensor: str) -> str:
        """Name of a tensor as vLLM and, up to renamed layers, the checkpoint have it."""
        return f"{self.prefix}.{expert}.{self.leaves[shard]}.{tensor}"

    def _require_form(self, weight: torch.Tensor, tensor: str, shard: str, expert: int) -> None:
        cut = self._cut_of(tensor, shard)
        dtypes = (INT4_TENSORS[tensor],) if tensor in INT4_TENSORS else _DENSE
        if tuple(weight.shape) != cut.whole or weight.dtype not in dtypes:
            raise ValueError(
                f"{METHOD}: {self._name(expert, shard, tensor)} is {weight.dtype} "
                f"{list(weight.shape)} in the checkpoint; it must be "
                f"{' or '.join(map(str, dtypes))} {list(cut.whole)}. Fetch its files and "
                "config.json again"
            )

    @abstractmethod
    def _take(self, expert: int, number: int, shard: str, tensor: str, part: torch.Tensor) -> None:
        """Take in a tensor of this rank's `expert`, which is `number` in the model."""

    def _add(self, expert: int, shard: str, weight: QuantizedWeight) -> None:
        """Put one part of an expert, as it was read, where it belongs."""
        if shard == "w2":
            weight = self.columns.own_part(weight)
        if self._parts is None:
            self._parts = self._empty()
        self._parts.add(expert, shard, weight)

    def _empty(self) -> ExpertParts:
        """Memory for all experts of this rank."""
        size = self.scheme.group_size
        rows = len(self.shards["w13"]) * self.intermediate
        offset = 0 if size == WHOLE_ROW else self.columns.start % size
        w13 = ExpertWeights.empty(self.experts, rows, self.hidden, size, 0, self.device)
        w2 = ExpertWeights.empty(
            self.experts, self.hidden, self.intermediate, size, offset, self.device
        )
        return ExpertParts({"w13": w13, "w2": w2}, self.shards)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace what was loaded by the tensors of the runtime layout.

        vLLM calls it twice; it works once.

        Raises:
            ValueError: the checkpoint lacks part of the experts.
        """
        if getattr(layer, PROCESSED, False):
            return
        parts, self._parts = self._parts, None
        if self.counts_loads:
            self._require_all_loaded(layer, parts)
        if parts is None:
            parts = self._empty()
            parts.fill_with_dummies()
        for name in self._names():
            # Tensors of other ranks' experts may still come for it.
            nothing = Parameter(torch.empty(0, device=self.device), requires_grad=False)
            nothing.weight_loader = _pass_over
            layer.register_parameter(name, nothing)
        w13, w2 = (parts.weights[matrix] for matrix in MATRICES)
        self._keep(layer, w13, w2)
        setattr(layer, PROCESSED, True)
        bytes_before = sum(math.prod(w.shape) for w in (w13, w2)) * self.experts
        bytes_before *= self.dtype.itemsize
        if self.ledger.finish(self.prefix, bytes_before, w13.nbytes + w2.nbytes):
            logger.info("%s: %s", METHOD, self.ledger.summary())

    def _require_all_loaded(self, layer: torch.nn.Module, parts: ExpertParts | None) -> None:
        expected = sum(getattr(layer, name).numel() for name in self._names())
        found = compat.loaded_elements(layer)
        if found < expected or parts is None or not parts.are_complete:
            raise ValueError(
                f"{METHOD}: the checkpoint gives {self.prefix} only {found} of the {expected} "
                f"weights of its {self.experts} experts; a tensor is missing or a shard of the "
                "checkpoint is. Compare its files with model.safetensors.index.json and fetch them "
                "again"
            )

    def _keep(self, layer: torch.nn.Module, w13: ExpertWeights, w2: ExpertWeights) -> None:
        """Register the tensors of the runtime layout, and compile the kernels they will meet."""
        self.group_offset = w2.group_offset
        for matrix, weights in zip(MATRICES, (w13, w2), strict=True):
            for name, tensor in (("packed", weights.words), ("scale", weights.scales)):
                parameter = Parameter(tensor, requires_grad=False)
                parameter.weight_loader = _pass_over
                layer.register_parameter(f"{matrix}_weight_{name}", parameter)
        arrivals = torch.zeros(
            arrivals_needed(w2.out_features), dtype=torch.int32, device=w2.words.device
        )
        # A buffer: sleep mode keeps nothing else, and the counters must stay 0.
        layer.register_buffer("weight_arrivals", arrivals, persistent=False)
        warm_up_experts(
            w13, w2, arrivals, self.activation, self.top_k, layer.expert_map, self.dtype
        )

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sum over this rank's chosen experts for x [M, H]: [M, H] in x's dtype.

        Args:
            layer: the experts.
            x: hidden states.
            topk_weights: [M, top_k].
            topk_ids: numbers of the experts in the model, int32 or int64 [M, top_k].
            shared_experts: left to vLLM's runner.
            shared_experts_input: as well.
        """
        return torch.ops.nanoquant.moe_w4a16(
            x,
            layer.w13_weight_packed,
            layer.w13_weight_scale,
            layer.w2_weight_packed,
            layer.w2_weight_scale,
            layer.weight_arrivals,
            topk_weights,
            topk_ids,
            layer.expert_map,
            self.intermediate,
            self.activation,
            self.scheme.group_size,
            self.group_offset,
        )


class NanoquantExpertsMethod(Int4ExpertsMethod):
    """Quantizes each expert's weights when all of the layer have been loaded."""

    def _cuts(self, whole: int) -> dict[str, dict[str, Cut]]:
        first = self.moe.tp_rank * self.intermediate
        columns = self.columns
        return {
            "weight": {
                "w13": Cut((whole, self.hidden), 0, first, self.intermediate),
                "w2": Cut((self.hidden, whole), 1, columns.read_start, columns.columns_read),
            }
        }

    def _take(self, expert: int, number: int, shard: str, tensor: str, part: torch.Tensor) -> None:
        scheme = self.scheme
        try:
            weight = quantize(part.to(self.dtype), scheme.group_size, scheme.algorithm, self.device)
        except ValueError as error:
            raise ValueError(f"{METHOD}: {self._name(number, shard, tensor)}: {error}") from error
        self._add(expert, shard, weight)


def _pass_over(
    param: Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Loader of a layer that has all that it needs."""
    return False if return_success else None


def leaves_of(layer: RoutedExperts) -> dict[str, str]:
    """What the checkpoint calls w1, w2 and w3 of an expert; no w3 where there is no gate."""
    names = {
        "w1": layer.ckpt_gate_proj_name,
        "w2": layer.ckpt_down_proj_name,
        "w3": layer.ckpt_up_proj_name,
    }
    return {shard: name for shard, name in names.items() if name}


def why_not_served(layer: RoutedExperts) -> str | None:
    """Say what keeps the experts of a layer from being served in int4; None for nothing."""
    activation = layer.activation.value
    if activation not in ACTIVATIONS:
        return f"their activation {activation} is none of {', '.join(ACTIVATIONS)}"
    if layer.apply_router_weight_on_input:
        return "the router's weights are applied to their input"
    if layer.moe_config.has_bias:
        return "they have biases"
    if layer.swiglu_limit is not None:
        return "their activation is clamped (swiglu_limit)"
    if layer.moe_config.is_lora_enabled:
        return "LoRA adapters are enabled"
    return None
