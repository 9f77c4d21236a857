# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's weights as dense fp32 tensors: stock, ours, or another tool's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.checkpoint.formats import Converted, Format, detect, read_module
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.source import kinds_of
from vllm_nanoquant.checkpoint.structure import parse_recipe, stored_recipe
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import QuantizedWeight


@dataclass(frozen=True)
class DenseWeights:
    """A checkpoint as a model without quantization sees it.

    Attributes:
        tensors: every tensor of the stock checkpoint by name, fp32.
        quantized: modules that are not stored as dense weights.
        bytes_quantized: of all tensors of those modules.
        bytes_all: of all tensors.
    """

    tensors: dict[str, torch.Tensor]
    quantized: tuple[str, ...]
    bytes_quantized: int
    bytes_all: int

    @property
    def bits_per_weight(self) -> float | None:
        """Bits for each weight of the quantized modules, scales and zero points included."""
        count = sum(self.tensors[module + naming.WEIGHT].numel() for module in self.quantized)
        return 8 * self.bytes_quantized / count if count else None

    def relative_error(self, stock: DenseWeights) -> float | None:
        """||W' - W|| / ||W|| over all quantized modules together; None where there are none."""
        squares = torch.zeros(2, dtype=torch.float64)
        for module in self.quantized:
            wanted = stock.tensors[module + naming.WEIGHT].double()
            difference = self.tensors[module + naming.WEIGHT].double() - wanted
            squares += torch.stack([(difference**2).sum(), (wanted**2).sum()])
        error, norm = squares.sqrt().tolist()
        return error / norm if self.quantized else None


def read_weights(folder: Path) -> DenseWeights:
    """Read a checkpoint's folder.

    Raises:
        CheckpointError: it is damaged, or in a format that cannot be read.
        UsageError: no checkpoint.
    """
    checkpoint = Checkpoint.open(folder)
    if stored_recipe(checkpoint.config) is not None:
        integers = _ours(checkpoint)
    else:
        fmt = detect(checkpoint.config, checkpoint.tensors)
        integers = {} if fmt is None else _foreign(checkpoint, fmt)
    tensors = {module + naming.WEIGHT: weight for module, weight in integers.items()}
    bytes_quantized = 0
    for name, entry in checkpoint.tensors.items():
        if name.rpartition(".")[0] not in integers or name.endswith(".bias"):
            tensors[name] = checkpoint.load(name).float()
        else:
            bytes_quantized += entry.nbytes
    bytes_all = sum(entry.nbytes for entry in checkpoint.tensors.values())
    return DenseWeights(tensors, tuple(integers), bytes_quantized, bytes_all)


def _ours(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    recipe, kinds = (
        parse_recipe(checkpoint.config["quantization_config"]),
        kinds_of(checkpoint.config),
    )
    found = {}
    for module in naming.modules_with_weights(checkpoint.tensors):
        if module + naming.PACKED not in checkpoint.tensors:
            continue
        scheme = recipe.scheme(module, kinds)
        if scheme is None or module + naming.ORDER in checkpoint.tensors:
            raise UsageError(f"{module}: not as `nanoquant quantize` writes it")
        packed = checkpoint.load(module + naming.PACKED)
        weight = QuantizedWeight(
            packed=packed,
            scale=checkpoint.load(module + naming.SCALE),
            zero_point=checkpoint.load(module + naming.ZERO_POINT),
            group_size=scheme.group_size,
            # An odd K would have a nibble to spare; the models measured here have none.
            in_features=2 * len(packed),
        )
        found[module] = dequantize(weight)
    return found


def _foreign(checkpoint: Checkpoint, fmt: Format) -> dict[str, torch.Tensor]:
    found = {}
    for module, stored in fmt.modules.items():
        given = {suffix: checkpoint.load(f"{module}.{suffix}") for suffix in stored.suffixes}
        result = read_module(fmt, module, given)
        if isinstance(result, Converted):
            dense = dequantize(result.weight)
            if result.order is not None:
                dense = dense[:, result.order.long().argsort()]
        else:
            dense = result.float()
        found[stored.name or module] = dense
    return found
