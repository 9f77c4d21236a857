# SPDX-License-Identifier: Apache-2.0
"""Our integers as compressed-tensors' `pack-quantized`, where that format can say them.

It knows whole zero points from 0 to 15 and groups that divide K. `w = (q - zero) * scale`, so our
zero point z is its zero -z; the integers and the bf16 scales stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from vllm_nanoquant.checkpoint.formats.base import FormatError
from vllm_nanoquant.checkpoint.formats.integers import (
    PER_WORD,
    SYMMETRIC_ZERO,
    missing_library,
    row_chunks,
)
from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight, unpack_nibbles

METHOD = "compressed-tensors"
LAYOUT = "pack-quantized"

_WAY_OUT = "keep our own format, or quantize the model with compressed-tensors' tools"


def packed_layout(
    rows: int, columns: int, group_size: int, symmetric: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of a `pack-quantized` module's tensors, by suffix."""
    groups = 1 if group_size == WHOLE_ROW else columns // group_size
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (rows, -(-columns // PER_WORD))),
        "weight_scale": ("BF16", (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not symmetric:
        layout["weight_zero_point"] = ("I32", (-(-rows // PER_WORD), groups))
    return layout


def check_layout(module: str, columns: int, group_size: int, ordered: bool) -> None:
    """Raise FormatError for a module whose groups `pack-quantized` or vLLM cannot have.

    Args:
        module: its name, for errors.
        columns: K.
        group_size: of its groups.
        ordered: whether its columns have an order of their own.
    """
    if group_size != WHOLE_ROW and columns % group_size:
        raise FormatError(
            f"{module} has {columns} inputs, so its last group of {group_size} is shorter than the "
            f"others; {LAYOUT} cannot say that: {_WAY_OUT}"
        )
    if ordered:
        raise FormatError(
            f"the columns of {module} are in the order of their groups (act-order), which stock "
            f"vLLM does not serve: {_WAY_OUT}"
        )


def is_symmetric(module: str, zero_point: torch.Tensor) -> bool:
    """Whether every zero point (bf16 [G, N]) is that of a symmetric weight.

    Raises FormatError for one that is not a whole number from -15 to 0.
    """
    value = zero_point.float()
    bad = (value != value.round()) | (value > 0) | (value < -15)
    if bool(bad.any()):
        group, row = (int(i) for i in bad.nonzero()[0])
        raise FormatError(
            f"{int(bad.sum())} zero points of {module} are not whole numbers from -15 to 0 (output "
            f"{row}, group {group}: {float(value[group, row]):g}); {LAYOUT} has no others: "
            f"{_WAY_OUT}"
        )
    return bool((value == -SYMMETRIC_ZERO).all())


def to_pack_quantized(weight: QuantizedWeight, symmetric: bool) -> dict[str, torch.Tensor]:
    """The tensors of `packed_layout` for a weight that `check_layout` and `is_symmetric` passed."""
    rows, columns = weight.shape
    device = weight.packed.device
    pack_to_int32 = _packer()
    words = torch.empty((rows, -(-columns // PER_WORD)), dtype=torch.int32, device=device)
    for part in row_chunks(rows, columns):
        q = unpack_nibbles(weight.packed[:, part], columns).to(torch.int8) - SYMMETRIC_ZERO
        words[part] = pack_to_int32(q, 4)
    tensors = {
        "weight_packed": words,
        "weight_scale": weight.scale.t().contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        zero = -weight.zero_point.float() - SYMMETRIC_ZERO
        packed = pack_to_int32(zero.t().to(torch.int8), 4, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    return tensors


def _packer() -> Callable[..., torch.Tensor]:
    """compressed-tensors' function that packs int32 words."""
    # Not at the top: it imports transformers, which takes seconds.
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise missing_library(error) from None
    packer: Callable[..., torch.Tensor] = pack_to_int32
    return packer


def pack_config(
    group_sizes: Mapping[str, int], dense: Iterable[str], symmetric: bool
) -> dict[str, object]:
    """The `quantization_config` of a `pack-quantized` checkpoint.

    Args:
        group_sizes: group size of each int4 module, by name.
        dense: names of the modules with a weight that is not quantized.
        symmetric: whether zero points are left out.
    """
    sizes = sorted(set(group_sizes.values()))
    groups = {}
    for index, size in enumerate(sizes):
        # One size: the class is enough. vLLM would prefer a class to the names that it fuses.
        names = sorted(module for module, group in group_sizes.items() if group == size)
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(sizes) == 1 else names,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size == WHOLE_ROW else "group",
                "group_size": None if size == WHOLE_ROW else size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    ignore = set(dense) if "lm_head" in group_sizes else {*dense, "lm_head"}
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
    }
