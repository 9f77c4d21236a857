# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel store it.

`qweight` int32 [K/8, N], `qzeros` int32 [G, N/8], `scales` fp16 [G, N], `g_idx` int32 [K] (the
group of each input). `w = (q - zero) * scale`. Format "gptq" stores each zero point less one,
"gptq_v2" as it is. A symmetric checkpoint has zero point 8, whatever `qzeros` says: vLLM does not
read them, and some writers label the second form as the first.
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
from vllm_nanoquant.checkpoint.formats.integers import (
    PER_WORD,
    SYMMETRIC_ZERO,
    expect,
    expect_matrix,
    from_integers,
    order_of,
    our_group_size,
    unpack_words,
)
from vllm_nanoquant.quantize.groups import group_count

_CONFIG = "quantization_config"
# One in each of the eight integers of a word.
_ONES = 0x11111111


def detect(options: Mapping[str, object], names: Iterable[str]) -> Format | None:
    """The format of a `quantization_config` with `quant_method` "gptq"; None for another method.

    Raises FormatError for other bits, an unknown `checkpoint_format`, and incomplete modules.
    """
    if options.get("quant_method") != "gptq":
        return None
    label = str(options.get("checkpoint_format") or "gptq")
    if label not in ("gptq", "gptq_v2"):
        raise FormatError(
            f"{_CONFIG}.checkpoint_format is {label!r}; only 'gptq' and 'gptq_v2' can be read"
        )
    symmetric = options.get("sym", True)
    if not isinstance(symmetric, bool):
        raise FormatError(f"{_CONFIG}.sym is {symmetric!r}; it must be true or false")
    stored = {}
    for module, suffixes in by_module(names).items():
        if "qweight" not in suffixes:
            continue
        require_suffixes(module, suffixes, ("qweight", "qzeros", "scales"))
        used = frozenset(suffixes & {"qweight", "qzeros", "scales", "g_idx"})
        size = _group_size(options, module)
        read = partial(_read, group_size=size, symmetric=symmetric, less_one=label == "gptq")
        ours = our_group_size(size, f"{_CONFIG}.group_size for {module}")
        layout = partial(_layout, group_size=size)
        stored[module] = StoredModule(label, used, layout, read, ours)
    return Format("gptq", stored)


def _group_size(options: Mapping[str, object], module: str) -> int:
    """Group size of a module: of the first rule of `dynamic` that matches it, else the common one.

    Raises FormatError for a module that is not of 4 bits.
    """
    chosen = {"bits": options.get("bits", 4), "group_size": options.get("group_size", 128)}
    rules = as_mapping(options.get("dynamic") or {}, f"{_CONFIG}.dynamic")
    for pattern, rule in rules.items():
        # Rules that begin with "-:" name modules left alone, which have no qweight; with their
        # prefix they match nothing.
        if matches_from_start(pattern.removeprefix("+:"), module):
            chosen |= as_mapping(rule, f"{_CONFIG}.dynamic[{pattern!r}]")
            break
    bits = as_integer(chosen["bits"], f"{_CONFIG}.bits for {module}")
    if bits != 4:
        raise FormatError(f"{module} has {bits} bits in this GPTQ checkpoint; only 4 can be read")
    return as_integer(chosen["group_size"], f"{_CONFIG}.group_size for {module}")


def _layout(module: str, tensors: Tensors, *, group_size: int) -> Layout:
    """The number of inputs is that of `g_idx`, as the last word need not be full."""
    words, rows = expect_matrix(f"{module}.qweight", tensors["qweight"], torch.int32)
    g_idx = tensors.get("g_idx")
    columns = words * PER_WORD if g_idx is None else g_idx.numel()
    if -(-columns // PER_WORD) != words:
        raise FormatError(
            f"{module}.g_idx has {columns} inputs, {module}.qweight {words} rows of eight: the "
            "checkpoint is damaged"
        )
    shape = (group_count(columns, group_size), -(-rows // PER_WORD))
    expect(f"{module}.qzeros", tensors["qzeros"], torch.int32, shape)
    return Layout(rows, columns, order_of(module, g_idx, columns, group_size) is not None)


def _read(
    module: str, tensors: Tensors, *, group_size: int, symmetric: bool, less_one: bool
) -> Converted:
    rows, columns, _ = _layout(module, tensors, group_size=group_size)
    groups = group_count(columns, group_size)
    zero = _zero_points(module, tensors["qzeros"], (groups, rows), symmetric, less_one)
    q = unpack_words(tensors["qweight"], (columns, rows), packed_dim=0).t()
    return from_integers(module, q, tensors["scales"], zero, group_size, tensors.get("g_idx"))


def _zero_points(
    module: str, words: torch.Tensor, shape: tuple[int, int], symmetric: bool, less_one: bool
) -> torch.Tensor | None:
    """Zero points, uint8 [G, N]; None for 8 everywhere."""
    if symmetric:
        stored = unpack_words(words, shape, packed_dim=1)
        if any(bool((stored == value).all()) for value in (SYMMETRIC_ZERO - 1, SYMMETRIC_ZERO)):
            return None
        raise FormatError(
            f"{_CONFIG}.sym is true, but {module}.qzeros has zero points other than 8: if the "
            "checkpoint is asymmetric, set sym to false in its config.json"
        )
    if less_one:
        # Whole words, so that a zero point of 0, which borrows from its neighbour when one is
        # taken away, comes back: this undoes what GPTQModel does when it writes this format.
        words = (words.to(torch.int64) + _ONES).to(torch.int32)
    return unpack_words(words, shape, packed_dim=1)
