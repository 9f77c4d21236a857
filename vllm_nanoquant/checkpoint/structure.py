# SPDX-License-Identifier: Apache-2.0
"""Which tensors a quantized checkpoint must have, by the recipe in its config.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, at, printable
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.source import kinds_of, ties_embeddings
from vllm_nanoquant.recipe import METHOD, Recipe, RecipeError, Scheme
from vllm_nanoquant.roles import LayerKind, Role, role_of

_OUR_KEYS = ("quant_method", "format_version", "producer")


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
    version = quantization["format_version"]
    if version != naming.FORMAT_VERSION:
        shown = version if isinstance(version, int) else "no number"
        raise CheckpointError(
            f"{naming.CONFIG}: format_version is {shown}; this release reads "
            f"{naming.FORMAT_VERSION}. Install a newer vllm-nanoquant"
        )
    try:
        return Recipe.parse({k: v for k, v in quantization.items() if k not in _OUR_KEYS})
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
    tied = ties_embeddings(checkpoint.config)
    found = {}
    for module in naming.modules_with_weights(checkpoint.tensors):
        dense = checkpoint.tensors.get(module + naming.WEIGHT)
        if dense is not None and (len(dense.shape) != 2 or dense.numel == 0):
            continue
        if naming.is_routed_expert(module) or (tied and role_of(module) is Role.LM_HEAD):
            continue
        if scheme := recipe.scheme(module, kinds):
            found[module] = scheme
    return found


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
    place = at(checkpoint.file_of(packed.name), packed.name)
    if packed.dtype != "U8" or len(packed.shape) != 2 or packed.numel == 0:
        yield f"{place}: {packed.dtype} {list(packed.shape)}; it must be U8 [ceil(K / 2), N]"
        return
    half, rows = packed.shape
    columns, problem = _columns(module, packed.shape, report)
    if problem:
        yield problem
    order = tensors.get(module + naming.ORDER)
    if order is not None and order.numel in (2 * half, 2 * half - 1):
        columns = order.numel
    layouts = [
        naming.quantized_layout(rows, count, scheme.group_size)
        for count in ([columns] if columns else [2 * half, 2 * half - 1])
    ]
    for suffix in (naming.SCALE, naming.ZERO_POINT):
        entry = tensors.get(module + suffix)
        if entry is None:
            yield f"{printable(module + suffix)}: is missing"
        elif all((entry.dtype, entry.shape) != layout[suffix] for layout in layouts):
            dtype, shape = layouts[0][suffix]
            yield (
                f"{at(checkpoint.file_of(entry.name), entry.name)}: {entry.dtype} "
                f"{list(entry.shape)}; groups of {scheme.group_size} need {dtype} {list(shape)}"
            )
    if order is not None and (order.dtype != "I32" or order.shape != (columns or 2 * half,)):
        yield (
            f"{at(checkpoint.file_of(order.name), order.name)}: {order.dtype} "
            f"{list(order.shape)}; it must be I32 [K]"
        )


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
