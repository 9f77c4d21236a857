# SPDX-License-Identifier: Apache-2.0
"""The linear methods' common part, and the one that quantizes: bf16 weights in, int4 kept.

A layer is built with its BF16 weight on the meta device, which costs nothing. vLLM collects what
the checkpoint brings for it, and when all is there gives the weight real memory, fills it, and
calls ``process_weights_after_loading``; then the BF16 weight goes. So one layer's BF16 weight is in
memory at a time; a very large one (an LM head) stays on the CPU, and its rows pass through the GPU
in chunks. Dummy weights and weight reloading take the same road. Weights that are int4 in the
checkpoint take it too (``stored.py``).
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_nanoquant import compat
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.ops import warm_up
from vllm_nanoquant.layers.replaced_loader import ReplaceableLoader
from vllm_nanoquant.layers.sharding import ColumnShare, column_share
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.recipe import METHOD, Scheme

logger = compat.init_logger(__name__)

LARGE_WEIGHT_BYTES = 512 << 20
"""A larger BF16 weight is not put on the GPU whole; an LM head [131072, 4480] takes 1.17 GB."""

# vLLM's name: it deletes the attribute before it processes a layer again for a reload.
PROCESSED = "_already_called_process_weights_after_loading"


class GroupAlignedWeight(ReplaceableLoader, ModelWeightParameter):
    """A rank's BF16 weight [N, columns read], with all columns of the groups that it touches."""

    columns: ColumnShare

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Copy this rank's columns, and the rest of their groups, of the whole weight [N, K]."""
        columns = self.columns
        part = loaded_weight.narrow(self.input_dim, columns.read_start, columns.columns_read)
        self.data.copy_(part)


class Int4Product(LinearMethodBase):
    """Multiplies by an int4 weight in the runtime layout, which it gives to its layer.

    Covers replicated, column-, row-, merged- and QKV-parallel layers, and the LM head.
    """

    def __init__(
        self, scheme: Scheme, prefix: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the method of one layer.

        Args:
            scheme: group size and algorithm.
            prefix: vLLM's full name of the layer.
            dtype: of the activations.
            device: where the int4 weight lies.
        """
        self.scheme = scheme
        self.prefix = prefix
        self.dtype = dtype
        self.device = device
        self.group_offset = 0
        self.out_features = 0

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Product x [..., K] by the weight [N, K], plus bias [N]: [..., N] in x's dtype."""
        return torch.ops.nanoquant.w4a16(
            x,
            layer.weight_packed,
            layer.weight_scale,
            layer.weight_arrivals,
            bias,
            self.out_features,
            self.scheme.group_size,
            self.group_offset,
        )

    def _keep(self, layer: torch.nn.Module, quantized: QuantizedWeight) -> int:
        """Register the tensors of the runtime layout, and compile the kernels that they will meet.

        Returns the bytes of the tensors.
        """
        self.out_features = quantized.out_features
        self.group_offset = quantized.group_offset
        weight = RuntimeWeight.from_quantized(quantized)
        weight = replace(
            weight,
            words=weight.words.to(self.device),
            scales=weight.scales.to(self.device),
            arrivals=weight.arrivals.to(self.device),
        )
        layer.register_parameter("weight_packed", Parameter(weight.words, requires_grad=False))
        layer.register_parameter("weight_scale", Parameter(weight.scales, requires_grad=False))
        # A buffer: sleep mode keeps nothing else, and the counters must stay 0.
        layer.register_buffer("weight_arrivals", weight.arrivals, persistent=False)
        warm_up(weight, _bias_given(layer), self.dtype)
        return weight.nbytes


def _bias_given(layer: torch.nn.Module) -> torch.Tensor | None:
    """The bias that vLLM hands to `apply`: none where it, or another rank, adds the bias."""
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    if elsewhere or getattr(layer, "skip_bias_add", False):
        return None
    return getattr(layer, "bias", None)


class Int4LinearMethod(Int4Product):
    """Multiplies by int4 weights that a checkpoint is loaded into; a subclass says what it has."""

    uses_meta_device = True
    """Tells vLLM's loaders that a layer is processed as soon as its weights are there."""
    columns: ColumnShare
    """What this rank reads of K, and what of that it keeps; known once the layer is built."""

    def __init__(self, scheme: Scheme, prefix: str, ledger: Ledger) -> None:
        """Make the method of one layer.

        Args:
            scheme: group size and algorithm.
            prefix: vLLM's full name of the layer.
            ledger: keeps count of what is quantized.
        """
        super().__init__(scheme, prefix, torch.bfloat16, torch.get_default_device())
        self.ledger = ledger
        engine = get_current_vllm_config()
        # Dummy weights never come through a loader, so there is nothing to count.
        self.counts_loads = engine.load_config.load_format != "dummy"
        self.takes_adapters = engine.lora_config is not None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer what its checkpoint has for it, on the meta device.

        Raises:
            ValueError: what `_prepare` refuses.
        """
        self.dtype = params_dtype
        rank = getattr(layer, "tp_rank", 0)
        self.columns = column_share(
            input_size, input_size_per_partition, rank, self.scheme.group_size
        )
        rows = sum(output_partition_sizes)
        self._prepare(layer, rows, input_size, output_size, extra_weight_attrs["weight_loader"])
        self.ledger.expect(self.prefix)
        compat.process_when_loaded(layer)
        compat.collect_bias(layer)

    @abstractmethod
    def _prepare(
        self,
        layer: torch.nn.Module,
        rows: int,
        input_size: int,
        output_size: int,
        loader: Callable[..., Any],
    ) -> None:
        """Register what is loaded; N is `rows` on this rank, [output_size, input_size] in all."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace what was loaded by the tensors of the runtime layout.

        vLLM calls it twice; it works once.

        Raises:
            ValueError: the checkpoint lacks part of the weight, or it is not usable.
        """
        if getattr(layer, PROCESSED, False):
            return
        self._require_all_loaded(layer)
        quantized = self._take_quantized(layer)
        nbytes = self._keep(layer, quantized)
        if self.takes_adapters and isinstance(layer, ParallelLMHead):
            # vLLM's LoRA asks the head's `weight` for dtype and device, and for nothing else
            # (lora/utils.py, 0.26 to 0.33).
            stand_in = torch.empty(0, dtype=self.dtype, device=self.device)
            layer.register_parameter("weight", Parameter(stand_in, requires_grad=False))
        setattr(layer, PROCESSED, True)
        bytes_before = math.prod(quantized.shape) * self.dtype.itemsize
        if self.ledger.finish(self.prefix, bytes_before, nbytes):
            logger.info("%s: %s", METHOD, self.ledger.summary())

    @abstractmethod
    def _take_quantized(self, layer: torch.nn.Module) -> QuantizedWeight:
        """Take what was loaded off the layer, as this rank's int4 weight.

        Raises:
            ValueError: the weight is not usable; the text names the tensor.
        """

    @staticmethod
    def _rows_to_load(layer: torch.nn.Module, rows: int) -> int:
        if isinstance(layer, ParallelLMHead):
            return int(layer.shard_indices.num_org_elements)
        return rows

    def _require_all_loaded(self, layer: torch.nn.Module) -> None:
        expected = sum(
            getattr(parameter, "weight_loader_numel", parameter.numel())
            for parameter in layer.parameters(recurse=False)
        )
        found = compat.loaded_elements(layer) if self.counts_loads else expected
        if found < expected:
            raise ValueError(
                f"{METHOD}: the checkpoint gives {self.prefix} only {found} of its {expected} "
                "weights; a tensor is missing or a shard of the checkpoint is. Compare its "
                "files with model.safetensors.index.json and fetch them again"
            )


@register_weight_loader_v2_supported_method
class NanoquantLinearMethod(Int4LinearMethod):
    """Quantizes a layer's weight when it has been loaded."""

    def _prepare(
        self,
        layer: torch.nn.Module,
        rows: int,
        input_size: int,
        output_size: int,
        loader: Callable[..., Any],
    ) -> None:
        columns = self.columns
        if rows * columns.columns_read * self.dtype.itemsize > LARGE_WEIGHT_BYTES:
            loader = compat.loader_filling_on_cpu(layer, loader)
        weight = GroupAlignedWeight(
            data=torch.empty(rows, columns.columns_read, device="meta", dtype=self.dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=loader,
        )
        weight.columns = columns
        weight.belongs_to(layer)
        # Rows that only pad the vocabulary are never loaded (vLLM 0.31 and later read this).
        weight.weight_loader_numel = self._rows_to_load(layer, rows) * columns.columns_read
        layer.register_parameter("weight", weight)

    def _take_quantized(self, layer: torch.nn.Module) -> QuantizedWeight:
        weight = layer.weight
        columns = weight.columns
        try:
            quantized = quantize(
                weight.data, self.scheme.group_size, self.scheme.algorithm, self.device
            )
        except ValueError as error:
            raise ValueError(f"{METHOD}: {self.prefix}.weight: {error}") from error
        quantized = columns.own_part(quantized)
        # vLLM's loader still holds the parameter; its memory is wanted now.
        weight.data = weight.data.new_empty(0)
        del layer.weight
        return quantized
