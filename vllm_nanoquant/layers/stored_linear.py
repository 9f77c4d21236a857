# SPDX-License-Identifier: Apache-2.0
"""The linear method for weights that are int4 in the checkpoint.

The layer is built with the checkpoint's tensors on the meta device, cut as its rank needs them.
vLLM fills them when the last one is there and calls ``process_weights_after_loading``, as for a
weight that is quantized while loading: so one layer at a time exists in both layouts. A rank reads
the whole groups that its columns touch and cuts its share out of them (``sharding.py``), which
gives the bytes that quantizing while loading gives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_nanoquant import compat
from vllm_nanoquant.checkpoint.stored import Int4Module, require_shape
from vllm_nanoquant.layers.linear import Int4LinearMethod
from vllm_nanoquant.layers.replaced_loader import (
    LoaderRelay,
    ReplaceableLoader,
    repeats_single_group,
)
from vllm_nanoquant.layers.sharding import stored_rows
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.recipe import METHOD, RecipeError, Scheme

LARGE_BYTES = 384 << 20
"""Tensors of a layer that are larger together do not go to the GPU; laying them out there takes
their own size and some 70 MB more than the result. An LM head [131072, 4480] has 312 MB."""

INT4_TENSORS = {
    "weight_packed": torch.uint8,
    "weight_scale": torch.bfloat16,
    "weight_zero_point": torch.bfloat16,
}
"""The tensors of an int4 weight in a checkpoint."""
# What quantizing a row of zeros gives: such rows pad the vocabulary.
_PADDING = {"weight_packed": 0, "weight_scale": 1, "weight_zero_point": 0}

# Dummy weights: any integers, and a scale and a zero point that keep them within vLLM's +-0.001.
_DUMMY_SEED = 1234
_DUMMY_SCALE = 1e-3 / 7.5
_DUMMY_ZERO_POINT = -7.5


class StoredTensor(ReplaceableLoader, ModelWeightParameter):
    """A rank's part of a tensor [rows along K, N] of the checkpoint, in the dtype it has there."""

    first: int
    """First of the rows along K that the rank reads, in the whole tensor."""
    place: str
    """Full name, for errors."""

    def _check(self, loaded_weight: torch.Tensor) -> None:
        """Refuse another dtype, which a copy would silently convert."""
        if loaded_weight.dtype != self.dtype:
            raise ValueError(
                f"{METHOD}: {self.place} is {loaded_weight.dtype} in the checkpoint; it must be "
                f"{self.dtype}. Fetch its files again, or make them again with 'nanoquant quantize'"
            )

    def adapted(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Turn a loader for a BF16 weight [N, K] into one for this tensor."""

        def load_transposed(param: "StoredTensor", loaded_weight: torch.Tensor) -> None:
            param._check(loaded_weight)
            loader(param.data.t(), loaded_weight.t())

        return load_transposed

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Copy this rank's columns (N) of the whole tensor."""
        self._check(loaded_weight)
        super().load_column_parallel_weight(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """Copy this rank's columns (N) of one part."""
        self._check(loaded_weight)
        super().load_merged_column_weight(loaded_weight, **kwargs)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """Copy this rank's heads of q, k or v."""
        self._check(loaded_weight)
        super().load_qkv_weight(loaded_weight, **kwargs)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Copy this rank's rows along K, and the rest of their groups."""
        self._check(loaded_weight)
        self.data.copy_(loaded_weight.narrow(0, self.first, self.shape[0]))


@register_weight_loader_v2_supported_method
class StoredLinearMethod(Int4LinearMethod):
    """Serves a weight that is int4 in the checkpoint."""

    def __init__(
        self, scheme: Scheme, prefix: str, ledger: Ledger, headers: Sequence[Int4Module] = ()
    ) -> None:
        """Make the method of one layer.

        Args:
            scheme: group size; the algorithm has done its work.
            prefix: vLLM's full name of the layer.
            ledger: keeps count of what has been loaded.
            headers: what the checkpoint's headers say of the modules that the layer serves as
                one; empty where none could be read.

        Raises:
            RecipeError: some of the parts are ordered and some are not.
        """
        super().__init__(scheme, prefix, ledger)
        self.headers = headers
        self.parts = [header.name for header in headers] or [prefix]
        self.ordered = any(header.ordered for header in headers)
        if self.ordered and not all(header.ordered for header in headers):
            raise RecipeError(self._orders_differ())

    def _prepare(
        self,
        layer: torch.nn.Module,
        rows: int,
        input_size: int,
        output_size: int,
        loader: Callable[..., Any],
    ) -> None:
        if self.headers:
            require_shape(
                self.headers, self._rows_stored(layer, output_size), input_size, self.prefix
            )
        self._refuse_split_order(self.columns.stop - self.columns.start, input_size)
        for name in INT4_TENSORS:
            layer.register_parameter(name, self._tensor(layer, name, rows, loader))
        if repeats_single_group(layer, self.prefix):
            relay = LoaderRelay(torch.empty(0, device="meta"), weight_loader=loader)
            relay.belongs_to(layer)
            layer.register_parameter("weight", relay)
        if self.ordered:
            data = torch.empty(len(self.headers), input_size, device="meta", dtype=torch.int32)
            order = Parameter(data, requires_grad=False)
            order.weight_loader = _load_order
            layer.register_parameter("weight_order", order)

    def _tensor(
        self, layer: torch.nn.Module, name: str, rows: int, loader: Callable[..., Any]
    ) -> StoredTensor:
        """One of the checkpoint's tensors, on the meta device; N is `rows` on this rank."""
        first, count = self._rows_read()[name]
        if isinstance(layer, ParallelLMHead):
            loader = _vocabulary_loader(layer.shard_indices, _PADDING[name])
        if self._bytes_read(rows) > LARGE_BYTES:
            loader = compat.loader_filling_on_cpu(layer, loader)
        tensor = StoredTensor(
            data=torch.empty(count, rows, device="meta", dtype=INT4_TENSORS[name]),
            input_dim=0,
            output_dim=1,
            weight_loader=loader,
        )
        tensor.belongs_to(layer)
        tensor.first = first
        tensor.place = f"{self.prefix}.{name}"
        return tensor

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Product x [..., K] by the weight [N, K], plus bias [N]: [..., N] in x's dtype."""
        if self.ordered:
            x = x.index_select(-1, layer.weight_order)
        return super().apply(layer, x, bias)

    def _rows_read(self) -> dict[str, tuple[int, int]]:
        """First row and number of rows, along K, of each tensor that this rank reads."""
        return stored_rows(self.columns, self.scheme.group_size)

    def _bytes_read(self, rows: int) -> int:
        """Bytes of the tensors that this rank reads, N being `rows`."""
        read = self._rows_read()
        return sum(read[name][1] * rows * dtype.itemsize for name, dtype in INT4_TENSORS.items())

    def _take_quantized(self, layer: torch.nn.Module) -> QuantizedWeight:
        tensors = [getattr(layer, name) for name in INT4_TENSORS]
        packed, scale, zero_point = (tensor.data for tensor in tensors)
        if not self.counts_loads:
            fill_with_dummies(packed, scale, zero_point)
        for name, tensor in (("weight_scale", scale), ("weight_zero_point", zero_point)):
            require_finite(tensor, f"{', '.join(self.parts)}: {name}")
        order = self._take_order(layer) if self.ordered else None
        columns = self.columns
        quantized = QuantizedWeight(
            packed, scale, zero_point, self.scheme.group_size, columns.columns_read
        )
        quantized = columns.own_part(quantized)
        for name, tensor in zip(INT4_TENSORS, tensors, strict=True):
            # vLLM's loader still holds the parameter; its memory is wanted as soon as possible.
            tensor.data = tensor.data.new_empty(0)
            delattr(layer, name)
        if "weight" in layer._parameters:
            del layer.weight
        if order is not None:
            order = Parameter(order.to(self.device), requires_grad=False)
            layer.register_parameter("weight_order", order)
        return quantized

    def _rows_stored(self, layer: torch.nn.Module, output_size: int) -> int:
        """N of the checkpoint's weights together, whatever a rank pads or repeats."""
        if isinstance(layer, ParallelLMHead):
            return int(layer.org_vocab_size)
        if isinstance(layer, QKVParallelLinear):
            heads = layer.total_num_heads + layer.total_num_kv_heads
            return int(heads * layer.head_size + layer.total_num_kv_heads * layer.v_head_size)
        if repeats_single_group(layer, self.prefix) and self.headers[0].packed_shape:
            # All but one of the ranks' copies of B and of C are not stored; how long they are, the
            # layer does not say.
            stored = self.headers[0].packed_shape[1]
            copies = 2 * (layer.tp_size - 1)
            return stored if (output_size - stored) % copies == 0 else output_size
        return output_size

    def _take_order(self, layer: torch.nn.Module) -> torch.Tensor:
        """Take the checkpoint's order off the layer: int32 [K], checked to be a permutation."""
        orders = layer.weight_order.data
        if not self.counts_loads:
            orders[:] = torch.arange(orders.shape[1], dtype=torch.int32, device=orders.device)
        order = orders[0].clone()
        if not bool((orders == order).all()):
            raise RecipeError(self._orders_differ())
        positions = torch.arange(len(order), dtype=torch.int32, device=order.device)
        if not torch.equal(order.sort().values, positions):
            raise ValueError(
                f"{METHOD}: {self.parts[0]}.weight_order is not a permutation of 0 to "
                f"{len(order) - 1}; the checkpoint is damaged, fetch its files again"
            )
        del layer.weight_order
        return order

    def _orders_differ(self) -> str:
        return (
            f"{METHOD}: {', '.join(self.parts)} are served as one product, {self.prefix}, and "
            "their columns are in different orders (weight_order); quantize again without "
            "activation order, or keep them in BF16"
        )

    def _refuse_split_order(self, share: int, columns: int) -> None:
        if self.ordered and share != columns:
            raise RecipeError(
                f"{METHOD}: {self.parts[0]}.weight_order orders all {columns} input features, and "
                f"{self.prefix} splits them over tensor-parallel ranks; use "
                "--tensor-parallel-size 1, or quantize again without activation order"
            )


def _vocabulary_loader(indices: Any, padding: int) -> Callable[..., None]:
    """Loader of this rank's part of the vocabulary; vLLM's own takes N to be the first dimension.

    Holds no reference to the layer: vLLM keeps loaders in a table with the layers as weak keys.
    Padding is copied as well, so that a rank that has nothing else waits for all of its tensors:
    vLLM counts what is copied.
    """
    start, count = indices.org_vocab_start_index, indices.num_org_elements

    def load_vocabulary(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        param._check(loaded_weight)
        param.data[:, :count].copy_(loaded_weight.narrow(1, start, count))
        rest = param.data[:, count:]
        rest.copy_(torch.full_like(rest, padding))

    return load_vocabulary


def _load_order(
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    loaded_shard_id: str | int | None = None,
) -> None:
    """Copy the order of one part, [K], to the part's row of [parts, K]."""
    by_name: dict[str | int | None, int] = {None: 0, "q": 0, "k": 1, "v": 2}
    part = by_name.get(loaded_shard_id, loaded_shard_id)
    param.data[part].copy_(loaded_weight)


def require_finite(tensor: torch.Tensor, place: str) -> None:
    """Refuse scales or zero points that no quantizer makes.

    Raises:
        ValueError: naming the place.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{METHOD}: {place} has values that are not finite; the checkpoint is damaged, fetch "
            "its files again"
        )


def fill_with_dummies(packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """Replace what vLLM's dummy loader leaves: it fills floating-point tensors only."""
    generator = torch.Generator(packed.device).manual_seed(_DUMMY_SEED)
    packed.random_(0, 256, generator=generator)
    scale.fill_(_DUMMY_SCALE)
    zero_point.fill_(_DUMMY_ZERO_POINT)
