# SPDX-License-Identifier: Apache-2.0
"""FP8 and NVFP4 checkpoints of NVIDIA's ModelOpt, and plain FP8 ones with block scales.

ModelOpt: `weight` float8 with `weight_scale`, or `weight` uint8 with `weight_scale` float8 for 16
inputs and `weight_scale_2`. Plain ("fp8"): `weight` float8 with `weight_scale_inv` for blocks of
`weight_block_size`, or with `weight_scale`. All are multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from vllm_nanoquant.checkpoint.formats.base import (
    Format,
    FormatError,
    StoredModule,
    as_integer,
    by_module,
)
from vllm_nanoquant.checkpoint.formats.floats import (
    fp8_layout,
    nvfp4_layout,
    read_fp8,
    read_nvfp4,
)

_DEFAULT_BLOCK = (128, 128)
_SCALES = ("weight_scale", "weight_scale_inv")


def detect(options: Mapping[str, object], names: Iterable[str]) -> Format | None:
    """The format of a `quantization_config` by ModelOpt or of plain FP8; None for another method.

    Raises FormatError for modules stored in another way.
    """
    method = str(options.get("quant_method") or "")
    if method != "fp8" and not method.startswith("modelopt"):
        return None
    block = _block(options.get("weight_block_size"))
    stored = {}
    for module, suffixes in by_module(names).items():
        scale = next((name for name in _SCALES if name in suffixes), None)
        if scale is None or "weight" not in suffixes:
            if suffixes & {"weight_scale_2", *_SCALES}:
                raise FormatError(
                    f"{module} has {', '.join(sorted(suffixes))}: not a weight with its scale; the "
                    "checkpoint is incomplete, or stored in a way that cannot be read"
                )
            continue
        if "pre_quant_scale" in suffixes:
            raise FormatError(f"{module} has a pre_quant_scale (ModelOpt AWQ): it cannot be read")
        if "weight_scale_2" in suffixes:
            used = frozenset({"weight", "weight_scale", "weight_scale_2"})
            nvfp4 = partial(read_nvfp4, packed="weight", scale="weight_scale_2")
            layout = partial(nvfp4_layout, packed="weight")
            stored[module] = StoredModule("nvfp4", used, layout, nvfp4)
        else:
            fp8 = partial(read_fp8, scale=scale, block=block)
            stored[module] = StoredModule("fp8", frozenset({"weight", scale}), fp8_layout, fp8)
    return Format(method, stored)


def _block(value: object) -> tuple[int, int]:
    """Rows and columns that share a scale; 128 x 128 where the config is silent."""
    if value is None:
        return _DEFAULT_BLOCK
    place = "quantization_config.weight_block_size"
    if not isinstance(value, list) or len(value) != 2:
        raise FormatError(f"{place} is {value!r}; it must be two numbers")
    height, width = as_integer(value[0], place), as_integer(value[1], place)
    if height < 1 or width < 1:
        raise FormatError(f"{place} is {value!r}; its numbers must be at least 1")
    return height, width
