# SPDX-License-Identifier: Apache-2.0
"""Which tensors a quantized checkpoint must have, by the recipe in its config.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, at, printable
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.source import keeps_lm_head, kinds_of
from vllm_nanoquant.checkpoint.stored import (
    FORMAT_KEYS,
    header_problems,
    int4_schemes,
    require_known_version,
)
from vllm_nanoquant.recipe import METHOD, Recipe, RecipeError, Scheme
from vllm_nanoquant.roles import LayerKind


def stored_recipe(config: dict[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint whose weights are int4 in our format.

    None for a stock checkpoint, one that only carries a recipe, and another method's.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return None
    return quantization if "format_version" in quantization else None


def parse_recipe(quantization: dict[str, Any]) -> Recipe:
    """Recipe of a stored ``quantization_config``.

    Raises:
        CheckpointError: another version of the format, or not a recipe.
    """
    try:
        require_known_version(quantization["format_version"])
        return Recipe.parse({k: v for k, v in quantization.items() if k not in FORMAT_KEYS})
    except RecipeError as error:
        raise CheckpointError(f"{naming.CONFIG}: {printable(str(error))}") from None


def check_structure(checkpoint: Checkpoint, report: dict[str, Any] | None) -> Iterator[str]:
    """Say which int4 tensors are missing, too many, or have the wrong dtype or shape.

    Args:
        checkpoint: headers and config.json, which agree with the index.
        report: its report, for the number of columns of each weight; None where there is none.
    """
    quantization = stored_recipe(checkpoint.config)
    if quantization is None:
        return
    try:
        recipe, kinds = parse_recipe(quantization), kinds_of(checkpoint.config)
        expected = _expected(checkpoint, recipe, kinds)
    except (CheckpointError, RecipeError) as error:
        yield printable(str(error)) if isinstance(error, RecipeError) else str(error)
        return
    for module, scheme in expected.items():
        yield from _check_module(checkpoint, module, scheme, report)
    known = set(expected)
    for name in checkpoint.tensors:
        for suffix in naming.QUANTIZED_SUFFIXES:
            if name.endswith(suffix) and name.removesuffix(suffix) not in known:
                yield (
                    f"{at(checkpoint.file_of(name), name)}: part of an int4 weight that "
                    f"{at(naming.CONFIG)} does not quantize"
                )
    for name in (report or {}).get("tensors", {}):
        if name.removesuffix(naming.WEIGHT) not in known:
            yield f"{at(naming.REPORT, name)}: is not an int4 weight of the checkpoint"


def _expected(
    checkpoint: Checkpoint, recipe: Recipe, kinds: tuple[LayerKind, ...] | None
) -> dict[str, Scheme]:
    """Scheme of each module that must be int4.

    A module's weight that is dense and covered is expected to be int4 as well, unless it is of
    those that are always kept, or has no two dimensions.
    """
    modules = []
    for module in naming.modules_with_weights(checkpoint.tensors):
        dense = checkpoint.tensors.get(module + naming.WEIGHT)
        if dense is None or (len(dense.shape) == 2 and dense.numel):
            modules.append(module)
    return int4_schemes(modules, recipe, kinds, keeps_lm_head(checkpoint.config))


def _check_module(
    checkpoint: Checkpoint, module: str, scheme: Scheme, report: dict[str, Any] | None
) -> Iterator[str]:
    tensors = checkpoint.tensors
    dense = module + naming.WEIGHT
    if dense in tensors:
        yield f"{at(checkpoint.file_of(dense), dense)}: is dense, and {naming.CONFIG} says int4"
    packed = tensors.get(module + naming.PACKED)
    if packed is None:
        if dense not in tensors:
            yield f"{printable(module + naming.PACKED)}: is missing"
        return
    columns = None
    if len(packed.shape) == 2:
        columns, problem = _columns(module, packed.shape, report)
        if problem:
            yield problem
    parts = {
        suffix: (tensors[module + suffix].dtype, tensors[module + suffix].shape)
        for suffix in naming.QUANTIZED_SUFFIXES
        if module + suffix in tensors
    }
    for suffix, problem in header_problems(module, parts, scheme.group_size, columns):
        name = module + suffix
        place = at(checkpoint.file_of(name), name) if name in tensors else printable(name)
        yield f"{place}: {problem}"


def _columns(
    module: str, packed_shape: tuple[int, ...], report: dict[str, Any] | None
) -> tuple[int | None, str | None]:
    """K by the report, and what is wrong with the report's shape; None where it does not say."""
    record = (report or {}).get("tensors", {}).get(module + naming.WEIGHT)
    if report is None:
        return None, None
    place = at(naming.REPORT, module + naming.WEIGHT)
    if record is None:
        return None, f"{place}: is missing"
    shape = record.get("shape")
    half, rows = packed_shape
    if shape not in ([rows, 2 * half], [rows, 2 * half - 1]):
        return None, f"{place}: its shape does not fit the packed weight's {list(packed_shape)}"
    return shape[1], None
