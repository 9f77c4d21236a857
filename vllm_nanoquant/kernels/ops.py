# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.nanoquant.w4a16`: the W4A16 product as one custom op, opaque to torch.compile.

The choice of a kernel by the number of tokens is made inside the op: a compiler that traced it
would freeze the branch taken at trace time. Importing this module does not import Triton.
"""

from __future__ import annotations

import torch

from vllm_nanoquant.kernels.reference import w4a16_reference
from vllm_nanoquant.quantize.groups import validate_quantized

SCHEMA = (
    "w4a16(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, "
    "Tensor? bias, int group_size, int group_offset) -> Tensor"
)

# Up to this many tokens the decode kernel runs (one tensor-core tile), above it the prefill path.
DECODE_LIMIT = 16

# A vector load takes 16 bytes; Triton would compile another kernel for a less aligned input.
ALIGNMENT = 16


def _validate(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> None:
    """Raise ValueError unless the kernels can run on these tensors without leaving them."""
    validate_quantized(packed, scale, zero_point, x.shape[-1], group_size, group_offset)
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {packed.device}")
    if bias is None:
        return
    if bias.shape != packed.shape[1:] or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}; "
            f"it must be {x.dtype} {list(packed.shape[1:])} on {x.device}"
        )
    if not bias.is_contiguous():
        raise ValueError("bias must be contiguous")


def _cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    _validate(x, packed, scale, zero_point, bias, group_size, group_offset)
    return w4a16_reference(x, packed, scale, zero_point, bias, group_size, group_offset)


def _cuda(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    from vllm_nanoquant.kernels.decode import decode
    from vllm_nanoquant.kernels.prefill import prefill

    _validate(x, packed, scale, zero_point, bias, group_size, group_offset)
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; on a GPU it must be torch.bfloat16 or torch.float16")
    shape = (*x.shape[:-1], packed.shape[1])
    if 0 in shape:
        return x.new_empty(shape)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if tokens.data_ptr() % ALIGNMENT:
        tokens = tokens.clone()
    product = decode if tokens.shape[0] <= DECODE_LIMIT else prefill
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(x.device):
        y = product(tokens, packed, scale, zero_point, bias, group_size, group_offset)
    return y.view(shape)


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


def _define() -> None:
    """Define the op, unless this process has it already (this module may be imported twice)."""
    namespace = torch.ops.nanoquant
    if hasattr(namespace, "w4a16"):
        return
    library = torch.library.Library("nanoquant", "FRAGMENT")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("w4a16", _cpu, "CPU")
    library.impl("w4a16", _cuda, "CUDA")
    torch.library.register_fake("nanoquant::w4a16", _fake, lib=library)
    # A library that is collected takes its ops with it. The namespace object lives as long as the
    # process, which a global of this module would not if the module were removed and imported anew.
    namespace.w4a16_library = library


_define()


def w4a16(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int = 0,
) -> torch.Tensor:
    """Multiply x [..., K] by a transposed int4 weight [N, K], add bias [N]: [..., N] in x.dtype.

    `weight_packed` is uint8 [ceil(K / 2), N], `weight_scale` and `weight_zero_point` are bf16
    [G, N] (see `QuantizedWeight`); `bias` has x's dtype. x may have any strides, any leading
    dimensions and 0 tokens. On a CPU x has any floating dtype and the reference runs; on a CUDA
    device x is bf16 or fp16, at most DECODE_LIMIT tokens go to the decode kernel and more to the
    prefill path. The call may be captured in a CUDA graph after `warm_up`.

    Raises ValueError when shapes, dtypes or devices do not fit together.
    """
    return torch.ops.nanoquant.w4a16(
        x, weight_packed, weight_scale, weight_zero_point, bias, group_size, group_offset
    )


def warm_up(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
    group_offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Compile and launch every kernel that serving this weight can need; on a CPU do nothing.

    One decode launch and one prefill launch: no kernel is specialised on the number of tokens
    beyond that. Arguments as in `w4a16`, with K given as `in_features` and x.dtype as `dtype`.
    """
    if weight_packed.device.type != "cuda":
        return
    for tokens in (1, DECODE_LIMIT + 1):
        x = torch.zeros((tokens, in_features), dtype=dtype, device=weight_packed.device)
        w4a16(x, weight_packed, weight_scale, weight_zero_point, bias, group_size, group_offset)
