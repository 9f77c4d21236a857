# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints: int4 in `pack-quantized`, FP8, NVFP4, and mixtures of them.

`pack-quantized`: `weight_packed` int32 [N, K/8] (q + 8 unsigned, lowest bits first),
`weight_scale` [N, G], `weight_shape` [2], `weight_zero_point` int32 [N/8, G] where asymmetric,
`weight_g_idx` int32 [K] where the groups are not contiguous. `w = (q - zero) * scale`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from vllm_nanoquant.checkpoint.formats.base import (
    Converted,
    Format,
    FormatError,
    Layout,
    StoredModule,
    Tensors,
    as_integer,
    as_mapping,
    by_module,
    matches_from_start,
    require_suffixes,
)
from vllm_nanoquant.checkpoint.formats.floats import (
    fp8_layout,
    nvfp4_layout,
    read_fp8,
    read_nvfp4,
)
from vllm_nanoquant.checkpoint.formats.integers import (
    PER_WORD,
    expect,
    from_integers,
    order_of,
    our_group_size,
    unpack_words,
)
from vllm_nanoquant.quantize.groups import WHOLE_ROW, group_count

METHOD = "compressed-tensors"
_PLACE = "quantization_config.config_groups"
_REGEX = "re:"


def detect(options: Mapping[str, object], names: Iterable[str]) -> Format | None:
    """The format of a `quantization_config` by compressed-tensors; None for another method.

    What a module's tensors are says how it is stored; `config_groups` says its group size.

    Raises FormatError for storage that cannot be read, and for incomplete modules.
    """
    if options.get("quant_method") != METHOD:
        return None
    groups = as_mapping(options.get("config_groups"), _PLACE)
    stored = {}
    dropped = set()
    for module, suffixes in by_module(names).items():
        if "weight_packed" not in suffixes and not {"weight", "weight_scale"} <= suffixes:
            continue
        weights = _weights_of(module, groups)
        stored[module] = _stored(module, suffixes, weights)
        if weights.get("symmetric", True) and "weight_zero_point" in suffixes:
            # Older writers keep a zero point of zeros.
            dropped.add(f"{module}.weight_zero_point")
    return Format(METHOD, stored, frozenset(dropped))


def _weights_of(module: str, groups: Mapping[str, object]) -> Mapping[str, object]:
    """The `weights` of the group a module belongs to: one that names it, else one for a class."""
    by_class = None
    for key, group in groups.items():
        content = as_mapping(group, f"{_PLACE}.{key}")
        targets = content.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise FormatError(f"{_PLACE}.{key}.targets is {targets!r}; it must be a list of names")
        weights = as_mapping(content.get("weights") or {}, f"{_PLACE}.{key}.weights")
        if any(_names(target, module) for target in targets):
            return weights
        if by_class is None and any("." not in target for target in targets):
            by_class = weights
    if by_class is None:
        raise FormatError(f"{module} is quantized, but no group in {_PLACE} names it")
    return by_class


def _names(target: str, module: str) -> bool:
    """Whether a target names a module: exactly, or as a regular expression from the start."""
    if target.startswith(_REGEX):
        return matches_from_start(target.removeprefix(_REGEX), module)
    return target == module


def _stored(module: str, suffixes: set[str], weights: Mapping[str, object]) -> StoredModule:
    """How one module is stored, by the tensors it has."""
    kind, bits = weights.get("type"), weights.get("num_bits")
    if "weight_global_scale" in suffixes:
        needed = frozenset({"weight_packed", "weight_scale", "weight_global_scale"})
        require_suffixes(module, suffixes, needed)
        nvfp4 = partial(read_nvfp4, packed="weight_packed", scale="weight_global_scale")
        layout = partial(nvfp4_layout, packed="weight_packed")
        return StoredModule("nvfp4", needed, layout, nvfp4)
    if "weight_packed" in suffixes and kind == "int" and bits == 4:
        return _int4(module, suffixes, weights)
    if "weight" in suffixes and kind == "float" and bits == 8:
        used = frozenset({"weight", "weight_scale"})
        fp8 = partial(read_fp8, scale="weight_scale", block=_block(weights))
        return StoredModule("fp8", used, fp8_layout, fp8)
    raise FormatError(
        f"{module} is stored as {kind} with {bits} bits ({', '.join(sorted(suffixes))}); only int4 "
        "(pack-quantized), FP8 and NVFP4 weights can be read. Quantize the unquantized model "
        "instead: nanoquant quantize"
    )


def _int4(module: str, suffixes: set[str], weights: Mapping[str, object]) -> StoredModule:
    symmetric = weights.get("symmetric", True)
    needed = {"weight_packed", "weight_scale", "weight_shape"}
    if not symmetric:
        needed.add("weight_zero_point")
    require_suffixes(module, suffixes, needed)
    used = frozenset(needed | (suffixes & {"weight_g_idx"}))
    strategy = weights.get("strategy")
    place = f"the group size of {module} in {_PLACE}"
    if strategy == "channel":
        group_size = WHOLE_ROW
    elif strategy in ("group", None):
        group_size = as_integer(weights.get("group_size"), place)
    else:
        raise FormatError(f"{module} has strategy {strategy!r}; only group and channel can be read")
    layout = partial(_layout, group_size=group_size)
    read = partial(_read, group_size=group_size)
    return StoredModule("pack-quantized", used, layout, read, our_group_size(group_size, place))


def _block(weights: Mapping[str, object]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the config names them."""
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(part) if part.isdigit() else part for part in block.split("x")]
    if isinstance(block, list) and len(block) == 2:
        place = f"block_structure in {_PLACE}"
        height, width = as_integer(block[0], place), as_integer(block[1], place)
        if height < 1 or width < 1:
            raise FormatError(f"{place} is {block}; its numbers must be at least 1")
        return height, width
    return None


def _layout(module: str, tensors: Tensors, *, group_size: int) -> Layout:
    rows, columns = _shape(f"{module}.weight_shape", tensors["weight_shape"])
    shape = (rows, -(-columns // PER_WORD))
    expect(f"{module}.weight_packed", tensors["weight_packed"], torch.int32, shape)
    groups = group_count(columns, group_size)
    scale = tensors["weight_scale"]
    expect(f"{module}.weight_scale", scale, scale.dtype, (rows, groups))
    if "weight_zero_point" in tensors:
        name, shape = f"{module}.weight_zero_point", (-(-rows // PER_WORD), groups)
        expect(name, tensors["weight_zero_point"], torch.int32, shape)
    order = order_of(module, tensors.get("weight_g_idx"), columns, group_size)
    return Layout(rows, columns, order is not None)


def _read(module: str, tensors: Tensors, *, group_size: int) -> Converted:
    rows, columns, _ = _layout(module, tensors, group_size=group_size)
    zero = None
    if "weight_zero_point" in tensors:
        shape = (rows, group_count(columns, group_size))
        zero = unpack_words(tensors["weight_zero_point"], shape, packed_dim=0).t()
    q = unpack_words(tensors["weight_packed"], (rows, columns), packed_dim=1)
    g_idx = tensors.get("weight_g_idx")
    return from_integers(module, q, tensors["weight_scale"].t(), zero, group_size, g_idx)


def _shape(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """N and K out of `weight_shape`."""
    if tensor.dtype not in (torch.int32, torch.int64) or tuple(tensor.shape) != (2,):
        raise FormatError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected two integers")
    rows, columns = (int(size) for size in tensor)
    if rows < 1 or columns < 1:
        raise FormatError(f"{name} is [{rows}, {columns}]; both must be at least 1")
    return rows, columns
