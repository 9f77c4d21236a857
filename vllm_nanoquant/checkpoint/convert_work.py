# SPDX-License-Identifier: Apache-2.0
"""The bytes of each step of a conversion, and what the report says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.convert_plan import ConvertStep
from vllm_nanoquant.checkpoint.errors import CheckpointError, at
from vllm_nanoquant.checkpoint.fidelity import relative_error
from vllm_nanoquant.checkpoint.formats import Converted, Format, read_module, tensors_of
from vllm_nanoquant.checkpoint.formats.export import to_pack_quantized
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.writer import Produced, tensor_bytes
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.quantize.groups import QuantizedWeight


class Work:
    """Makes the bytes of each step."""

    def __init__(
        self,
        source: Checkpoint,
        fmt: Format | None,
        algorithm: str,
        device: torch.device,
    ) -> None:
        """Prepare to work.

        Args:
            source: the checkpoint to convert.
            fmt: its format; None where it is ours.
            algorithm: for weights that are quantized again.
            device: where the arithmetic is done.
        """
        self._source = source
        self._fmt = fmt
        self._algorithm = algorithm
        self._device = device

    def produce(self, step: ConvertStep) -> Produced:
        """Bytes of one step, copied or converted."""
        source = self._source
        if step.module is None:
            return Produced(source.chunks(step.key), {})
        prefix = f"{step.module}."
        given = {
            entry.name.removeprefix(prefix): source.load(entry.name).to(self._device)
            for entry in step.sources
        }
        try:
            tensors, record = self._convert(step, given)
        except CheckpointError:
            raise
        except ValueError as error:
            place = at(source.file_of(step.sources[0].name), step.module)
            raise CheckpointError(f"{place}: {error}") from None
        parts = [tensor_bytes(tensors[output.name]) for output in step.outputs]
        return Produced(parts, record)

    def _convert(
        self, step: ConvertStep, given: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors of one module by full name, and its record."""
        fmt = self._fmt
        assert step.module is not None and step.shape is not None
        name = step.key.removesuffix(naming.WEIGHT)
        record: dict[str, Any] = {"shape": list(step.shape)}
        if fmt is None:
            return self._exported(step, given), self._sizes(step, record)
        result = read_module(fmt, step.module, given)
        record["stored_as"] = fmt.modules[step.module].storage
        if isinstance(result, torch.Tensor) and step.group_size is not None:
            weight = quantize(result, step.group_size, self._algorithm, self._device)
            record["algorithm"] = self._algorithm
            record["relative_error"] = relative_error(result, weight)
            result = Converted(weight)
        elif isinstance(result, Converted):
            record["algorithm"] = "taken over"
            record["rounded_scales"] = result.rounded_scales
            record["largest_rounding"] = float(f"{result.largest_rounding:.6g}")
        return tensors_of(name, result), self._sizes(step, record)

    @staticmethod
    def _exported(step: ConvertStep, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert step.shape is not None and step.group_size is not None
        weight = QuantizedWeight(
            given[naming.PACKED[1:]],
            given[naming.SCALE[1:]],
            given[naming.ZERO_POINT[1:]],
            step.group_size,
            step.shape[1],
        )
        names = {output.name.rpartition(".")[2] for output in step.outputs}
        packed = to_pack_quantized(weight, symmetric="weight_zero_point" not in names)
        return {f"{step.module}.{suffix}": tensor for suffix, tensor in packed.items()}

    @staticmethod
    def _sizes(step: ConvertStep, record: dict[str, Any]) -> dict[str, Any]:
        """The record with what is known from the plan."""
        known = {
            "bits": 4,
            "group_size": step.group_size,
            "bytes_before": step.nbytes,
            "bytes_after": sum(output.nbytes for output in step.outputs),
        }
        return record | known
