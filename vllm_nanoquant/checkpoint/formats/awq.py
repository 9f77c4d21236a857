# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's GEMM layout: `qweight` int32 [K, N/8], `qzeros` int32 [G, N/8], `scales` fp16 [G, N].

A word holds the integers of eight outputs, output 8j + ORDER[i] in bits 4i to 4i + 3.
`w = (q - zero) * scale`.
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
    by_module,
    require_suffixes,
)
from vllm_nanoquant.checkpoint.formats.integers import (
    PER_WORD,
    expect,
    expect_matrix,
    from_integers,
    our_group_size,
    unpack_words,
)
from vllm_nanoquant.quantize.groups import group_count

# Where in a word each of eight outputs lies: output i is in bits 4p to 4p + 3, p = _PLACE[i].
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


def detect(options: Mapping[str, object], names: Iterable[str]) -> Format | None:
    """The format of a `quantization_config` with `quant_method` "awq"; None for another method.

    Raises FormatError for other bits or another layout than GEMM, and for incomplete modules.
    """
    if options.get("quant_method") != "awq":
        return None
    bits = as_integer(options.get("bits", options.get("w_bit", 4)), "quantization_config.bits")
    if bits != 4:
        raise FormatError(f"this AWQ checkpoint has {bits} bits; only 4 can be read")
    version = str(options.get("version", "gemm")).lower()
    if version != "gemm":
        raise FormatError(
            f"this AWQ checkpoint has version {version!r}; only 'gemm' can be read, which is what "
            "AutoAWQ writes by default"
        )
    place = "quantization_config.group_size"
    given = options.get("group_size", options.get("q_group_size", 128))
    group_size = as_integer(given, place)
    ours = our_group_size(group_size, place)
    layout = partial(_layout, group_size=group_size)
    read = partial(_read, group_size=group_size)
    stored = {}
    for module, suffixes in by_module(names).items():
        if "qweight" not in suffixes:
            continue
        require_suffixes(module, suffixes, ("qweight", "scales"))
        used = frozenset(suffixes & {"qweight", "qzeros", "scales"})
        stored[module] = StoredModule("awq", used, layout, read, ours)
    return Format("awq", stored)


def _layout(module: str, tensors: Tensors, *, group_size: int) -> Layout:
    columns, words = expect_matrix(f"{module}.qweight", tensors["qweight"], torch.int32)
    if "qzeros" in tensors:
        shape = (group_count(columns, group_size), words)
        expect(f"{module}.qzeros", tensors["qzeros"], torch.int32, shape)
    return Layout(words * PER_WORD, columns)


def _read(module: str, tensors: Tensors, *, group_size: int) -> Converted:
    """One module; without `qzeros` it is symmetric."""
    rows, columns, _ = _layout(module, tensors, group_size=group_size)
    q = _unpack(tensors["qweight"], (columns, rows)).t()
    zero = None
    if "qzeros" in tensors:
        zero = _unpack(tensors["qzeros"], (group_count(columns, group_size), rows))
    return from_integers(module, q, tensors["scales"], zero, group_size)


def _unpack(words: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """int32 [X, N/8] in AWQ's order to uint8 [X, N]."""
    plain = unpack_words(words, shape, packed_dim=1)
    place = torch.tensor(_PLACE, device=words.device)
    return plain.view(shape[0], -1, PER_WORD)[:, :, place].reshape(shape)
