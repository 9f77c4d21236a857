# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint beside the stock one that it was made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import at, printable
from vllm_nanoquant.checkpoint.fidelity import relative_error
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.source import kinds_of
from vllm_nanoquant.checkpoint.structure import parse_recipe, stored_recipe
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.recipe import Recipe

MAX_ERROR = 0.5
"""Relative error that no quantizer makes of a real weight: random integers make more."""
_REPORT_TOLERANCE = 1e-4  # six digits are in the report; devices differ in the order of sums


def compare(
    result: Checkpoint, source: Checkpoint, report: dict[str, Any] | None
) -> Iterator[tuple[str, float | None, str | None]]:
    """Compare tensor by tensor.

    Yields:
        Name in the source, relative error of an int4 weight, problem; None where there is none. A
        tensor that is not quantized must have the source's very bytes.
    """
    quantization = stored_recipe(result.config)
    recipe = parse_recipe(quantization) if quantization else None
    for name, entry in source.tensors.items():
        module = name.removesuffix(naming.WEIGHT)
        if name.endswith(naming.WEIGHT) and module + naming.PACKED in result.tensors and recipe:
            yield name, *_compare_weight(result, source, module, recipe, report)
        elif name not in result.tensors:
            yield name, None, f"{printable(name)}: is in the source and not in the checkpoint"
        else:
            other = result.tensors[name]
            same = (entry.dtype, entry.shape) == (other.dtype, other.shape)
            if not same or _digest(source, name) != _digest(result, name):
                place = at(result.file_of(name), name)
                yield name, None, f"{place}: is not the source's, and was not quantized"
    for name in result.tensors:
        stem = next((s for s in naming.QUANTIZED_SUFFIXES if name.endswith(s)), None)
        origin = name.removesuffix(stem) + naming.WEIGHT if stem else name
        if origin not in source.tensors:
            yield name, None, f"{at(result.file_of(name), name)}: is not in the source"


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    digest = hashlib.sha256()
    for part in checkpoint.chunks(name):
        digest.update(part)
    return digest.digest()


def _compare_weight(
    result: Checkpoint,
    source: Checkpoint,
    module: str,
    recipe: Recipe,
    report: dict[str, Any] | None,
) -> tuple[float | None, str | None]:
    """Relative error of one int4 weight, and what is wrong with it."""
    name = module + naming.WEIGHT
    place = at(result.file_of(module + naming.PACKED), name)
    scheme = recipe.scheme(module, kinds_of(result.config))
    shape = source.tensors[name].shape
    packed = result.tensors[module + naming.PACKED].shape
    if scheme is None or len(shape) != 2 or packed != ((shape[1] + 1) // 2, shape[0]):
        return None, f"{place}: the source's weight {list(shape)} does not fit {list(packed)}"
    order = None
    if module + naming.ORDER in result.tensors:
        order = result.load(module + naming.ORDER).long()
        if order.numel() != shape[1]:
            return None, f"{place}: {order.numel()} columns are ordered, of {shape[1]}"
    try:
        weight = QuantizedWeight(
            packed=result.load(module + naming.PACKED),
            scale=result.load(module + naming.SCALE),
            zero_point=result.load(module + naming.ZERO_POINT),
            group_size=scheme.group_size,
            in_features=shape[1],
        )
    except ValueError as problem:
        return None, f"{place}: {problem}"
    error = relative_error(source.load(name), weight, order)
    if not math.isfinite(error) or error > MAX_ERROR:
        return error, f"{place}: its relative error is {error:.3g}; it is another weight"
    stated = ((report or {}).get("tensors", {}).get(name) or {}).get("relative_error")
    if isinstance(stated, float) and abs(stated - error) > _REPORT_TOLERANCE * max(stated, error):
        return error, f"{place}: its relative error is {error:.6g}, and {stated:.6g} in the report"
    return error, None
