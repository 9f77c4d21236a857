# SPDX-License-Identifier: Apache-2.0
"""The layout of redhelix/nanoquant: three files beside an ordinary BF16 checkpoint.

`w4a16_weights.safetensors` holds, for each Mamba projection, `W_q` uint8 [K/2, N] (low nibble: even
k), `scales` and `zeros` bf16 [K/g, N] with `w = (q + zero) * scale`: our own number format, so the
bytes are taken over as they are. The BF16 shards still hold the weights that these replace.
Source: nanoquant/kernel.py and checkpoint.py of that repository, commit d8371ec.
"""

from __future__ import annotations

import re
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
    by_module,
    require_suffixes,
)
from vllm_nanoquant.checkpoint.formats.integers import expect, expect_matrix, our_group_size
from vllm_nanoquant.quantize.groups import QuantizedWeight

WEIGHTS_FILE = "w4a16_weights.safetensors"
"""The shard that no index names."""

_SUFFIXES = frozenset({"W_q", "scales", "zeros"})
_LAYERS = re.compile(r"(?:^|.*\.)(layers\.\d+\..*)$")


def detect(options: Mapping[str, object], names: Iterable[str]) -> Format | None:
    """The format, when tensors named `W_q` are there; None otherwise.

    Args:
        options: the content of quantization_config.json; its group size is used, 128 if absent.
        names: of every tensor, those of `WEIGHTS_FILE` included.

    Raises:
        FormatError: an incomplete module, or one whose BF16 weight cannot be found.
    """
    modules = by_module(names)
    quantized = {module: suffixes for module, suffixes in modules.items() if "W_q" in suffixes}
    if not quantized:
        return None
    place = "group_size in quantization_config.json"
    group_size = as_integer(options.get("group_size", 128), place)
    dense = {module for module, suffixes in modules.items() if "weight" in suffixes}
    stored = {}
    dropped = set()
    for module, suffixes in quantized.items():
        require_suffixes(module, suffixes, _SUFFIXES)
        name = _dense_name(module, dense)
        dropped.add(f"{name}.weight")
        size = our_group_size(group_size, place)
        layout = partial(_layout, group_size=group_size)
        read = partial(_read, group_size=group_size)
        stored[module] = StoredModule("redhelix/nanoquant", _SUFFIXES, layout, read, size, name)
    return Format("redhelix/nanoquant", stored, frozenset(dropped))


def _dense_name(module: str, dense: set[str]) -> str:
    """Name of the BF16 module that `module` replaces: equal from `layers.` on."""
    bare = module.removesuffix(".weight")
    if bare in dense:
        return bare
    tail = _tail(bare)
    found = sorted(name for name in dense if _tail(name) == tail)
    if len(found) != 1:
        raise FormatError(
            f"{module} in {WEIGHTS_FILE} replaces {len(found)} modules of the BF16 shards "
            f"({', '.join(found) or 'none has that name'}); it must replace one: the files are not "
            "of one model"
        )
    return found[0]


def _tail(module: str) -> str:
    found = _LAYERS.match(module)
    return found[1] if found else module


def _layout(module: str, tensors: Tensors, *, group_size: int) -> Layout:
    half, rows = expect_matrix(f"{module}.W_q", tensors["W_q"], torch.uint8)
    columns = 2 * half
    if group_size < 1 or columns % group_size:
        raise FormatError(
            f"{module}: {columns} inputs are no multiple of the group size {group_size} in "
            "quantization_config.json"
        )
    shape = (columns // group_size, rows)
    for name in ("scales", "zeros"):
        expect(f"{module}.{name}", tensors[name], torch.bfloat16, shape)
    return Layout(rows, columns)


def _read(module: str, tensors: Tensors, *, group_size: int) -> Converted:
    """The three tensors as they are, or with the groups of a size we do not have cut."""
    columns = _layout(module, tensors, group_size=group_size).columns
    scale, zero_point = tensors["scales"], tensors["zeros"]
    for name, tensor in (("scales", scale), ("zeros", zero_point)):
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{module}.{name} has values that are not finite numbers")
    size = our_group_size(group_size, module)
    repeats = group_size // size
    weight = QuantizedWeight(
        tensors["W_q"].contiguous(),
        scale.repeat_interleave(repeats, dim=0).contiguous(),
        zero_point.repeat_interleave(repeats, dim=0).contiguous(),
        size,
        columns,
    )
    return Converted(weight)
