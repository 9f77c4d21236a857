# SPDX-License-Identifier: Apache-2.0
"""FP8 and NVFP4 weights, read as dense bf16 weights: value times scale in fp32, rounded once.

FP8: `weight` float8_e4m3fn [N, K] and a scale for the tensor, for each row, or for each block.
NVFP4: two e2m1 numbers in a byte (low half: even k), a float8 scale for 16 inputs and one fp32
scale for the tensor, which ModelOpt multiplies by and compressed-tensors divides by.
"""

from __future__ import annotations

import torch

from vllm_nanoquant.checkpoint.formats.base import FormatError, Layout, Tensors
from vllm_nanoquant.checkpoint.formats.integers import (
    expect,
    expect_matrix,
    missing_library,
    row_chunks,
)

NVFP4_GROUP = 16
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def fp8_layout(module: str, tensors: Tensors) -> Layout:
    """Shape of an FP8 module; raises FormatError for another dtype."""
    return Layout(*expect_matrix(f"{module}.weight", tensors["weight"], torch.float8_e4m3fn))


def nvfp4_layout(module: str, tensors: Tensors, *, packed: str) -> Layout:
    """Shape of an NVFP4 module; raises FormatError where it is not one."""
    rows, half = expect_matrix(f"{module}.{packed}", tensors[packed], torch.uint8)
    columns = 2 * half
    if columns % NVFP4_GROUP:
        raise FormatError(f"{module}.{packed} has {columns} inputs, no multiple of {NVFP4_GROUP}")
    shape = (rows, columns // NVFP4_GROUP)
    expect(f"{module}.weight_scale", tensors["weight_scale"], torch.float8_e4m3fn, shape)
    return Layout(rows, columns)


def read_fp8(
    module: str, tensors: Tensors, *, scale: str, block: tuple[int, int] | None
) -> torch.Tensor:
    """Dense bf16 [N, K] of an FP8 module.

    Args:
        module: its name, for errors.
        tensors: "weight" and the scale.
        scale: the scale's name, "weight_scale" or "weight_scale_inv"; both are multiplied by.
        block: rows and columns that share a scale, where the config names them.

    Raises:
        FormatError: dtypes or shapes that do not fit, a scale that is not finite.
    """
    rows, columns, _ = fp8_layout(module, tensors)
    factor = _checked_scale(f"{module}.{scale}", tensors[scale])
    shape = tuple(size for size in factor.shape if size != 1)
    if factor.numel() == 1:
        height, width = rows, columns
    elif shape == (rows,) and factor.shape[0] == rows:
        height, width = 1, columns
    elif block is not None and factor.numel() == -(-rows // block[0]) * -(-columns // block[1]):
        height, width = block
    else:
        wanted = "" if block is None else f", or one for each block of {block[0]} x {block[1]}"
        raise FormatError(
            f"{module}.{scale} is {list(factor.shape)}; a weight [{rows}, {columns}] has one "
            f"scale, one for each row{wanted}: the checkpoint does not fit its config.json"
        )
    factor = factor.reshape(-(-rows // height), -(-columns // width))
    column = torch.arange(columns, device=factor.device) // width
    row = torch.arange(rows, device=factor.device) // height
    result = torch.empty((rows, columns), dtype=torch.bfloat16, device=factor.device)
    for part in row_chunks(rows, columns):
        values = tensors["weight"][part].float()
        result[part] = values.mul_(factor[row[part]][:, column])
    return _checked_result(module, result)


def read_nvfp4(module: str, tensors: Tensors, *, packed: str, scale: str) -> torch.Tensor:
    """Dense bf16 [N, K] of an NVFP4 module.

    Args:
        module: its name, for errors.
        tensors: the packed weight, "weight_scale" and the scale of the tensor.
        packed: name of the packed weight: "weight" (ModelOpt) or "weight_packed".
        scale: name of the tensor's scale: "weight_scale_2" (multiplied by) or
            "weight_global_scale" (divided by).

    Raises:
        FormatError: dtypes or shapes that do not fit, a scale that is not finite or divides by 0.
    """
    # Not at the top: it imports transformers, which takes seconds.
    try:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    except ImportError as error:
        raise missing_library(error) from None
    rows, columns, _ = nvfp4_layout(module, tensors, packed=packed)
    groups = columns // NVFP4_GROUP
    local = tensors["weight_scale"]
    overall = _checked_scale(f"{module}.{scale}", tensors[scale])
    if overall.numel() != 1:
        raise FormatError(f"{module}.{scale} is {list(overall.shape)}; expected one number")
    overall = overall.reshape(())
    if scale == "weight_global_scale":
        if float(overall) == 0.0:
            raise FormatError(f"{module}.{scale} is 0, and the weights are divided by it")
        overall = overall.reciprocal()
    result = torch.empty((rows, columns), dtype=torch.bfloat16, device=local.device)
    for part in row_chunks(rows, columns):
        count = part.stop - part.start
        values = unpack_fp4_from_uint8(tensors[packed][part], count, columns, torch.float32)
        factor = (local[part].float() * overall).unsqueeze(-1)
        result[part] = (values.view(count, groups, NVFP4_GROUP) * factor).view(count, columns)
    return _checked_result(module, result)


def _checked_scale(name: str, scale: torch.Tensor) -> torch.Tensor:
    """A scale in fp32; raises FormatError for another kind of tensor or a value not finite."""
    if scale.dtype not in _SCALE_TYPES or scale.numel() == 0:
        raise FormatError(f"{name} is {scale.dtype} {list(scale.shape)}; expected float scales")
    factor = scale.float()
    if not bool(torch.isfinite(factor).all()):
        raise FormatError(f"{name} has values that are not finite numbers")
    return factor


def _checked_result(module: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight; raises FormatError where it holds a NaN or an infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise FormatError(f"the weight of {module} has values that are not finite numbers")
    return weight
