# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.nanoquant.w4a16`: the W4A16 product as one custom op, opaque to torch.compile.

The choice of a kernel by the number of tokens is made inside the op: a compiler that traced it
would freeze the branch taken at trace time. Importing this module does not import Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.reference import w4a16_reference
from vllm_nanoquant.kernels.settings import fused_buckets, fused_limit

SCHEMA = (
    "w4a16(Tensor x, Tensor words, Tensor scales, Tensor arrivals, Tensor? bias, "
    "int out_features, int group_size, int group_offset) -> Tensor"
)

# Up to this many tokens the decode kernel runs (two columns of tensor-core tiles).
DECODE_LIMIT = 16

# A vector load takes 16 bytes; Triton would compile another kernel for a less aligned input.
ALIGNMENT = 16

_warm: set[tuple[object, ...]] = set()
_NOTHING_TO_DO = nullcontext()


def _runtime_weight(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    arrivals: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    group_offset: int,
) -> RuntimeWeight:
    """Gather the weight; ValueError unless kernels can run on it without leaving its tensors."""
    weight = RuntimeWeight(
        words, scales, arrivals, out_features, x.shape[-1], group_size, group_offset
    )
    if x.device != words.device:
        raise ValueError(f"x is on {x.device}, the weight on {words.device}")
    if bias is None:
        return weight
    if bias.shape != (out_features,) or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}; "
            f"it must be {x.dtype} {[out_features]} on {x.device}"
        )
    if not bias.is_contiguous():
        raise ValueError("bias must be contiguous")
    return weight


def _cpu(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    arrivals: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    weight = _runtime_weight(
        x, words, scales, arrivals, bias, out_features, group_size, group_offset
    )
    return w4a16_reference(x, weight, bias)


def _cuda(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    arrivals: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    weight = _runtime_weight(
        x, words, scales, arrivals, bias, out_features, group_size, group_offset
    )
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; on a GPU it must be torch.bfloat16 or torch.float16")
    shape = (*x.shape[:-1], out_features)
    if 0 in shape:
        return x.new_empty(shape)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if tokens.data_ptr() % ALIGNMENT:
        tokens = tokens.clone()
    with launching_on(x.device):
        return _product(tokens, weight, bias).view(shape)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Context in which Triton launches on a GPU: it does on the current one."""
    if device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(device)


def _product(x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Product of x [M, K], M >= 1, by the kernel for that number of tokens."""
    decode, fused, prefill = _kernels()
    if x.shape[0] <= DECODE_LIMIT:
        return decode(x, weight, bias)
    if x.shape[0] <= fused_limit(weight, x.device):
        return fused(x, weight, bias)
    return prefill(x, weight, bias)


@functools.cache
def _kernels() -> tuple[Callable[..., torch.Tensor], ...]:
    """The three products; importing them imports Triton, and takes time at every call."""
    from vllm_nanoquant.kernels.decode import decode
    from vllm_nanoquant.kernels.fused import fused
    from vllm_nanoquant.kernels.prefill import prefill

    return decode, fused, prefill


def _fake(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    arrivals: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    require_one_device(x, words, scales, arrivals)
    return x.new_empty((*x.shape[:-1], out_features))


def require_one_device(x: torch.Tensor, *weights: torch.Tensor) -> None:
    """Refuse a weight that is partly elsewhere.

    PyTorch takes the fake of an op as soon as one tensor has no values. Where that is a buffer that
    was left on the meta device, the result would be memory that nobody wrote.

    Raises:
        ValueError: a tensor of the weight is not on x's device.
    """
    for each in weights:
        if each.device != x.device:
            raise ValueError(
                f"x is on {x.device}, a tensor of the weight on {each.device}; bring all of the "
                "layer to one device, after its weights are loaded"
            )


def define_op(
    schema: str,
    cpu: Callable[..., torch.Tensor],
    cuda: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
) -> None:
    """Define an op of `torch.ops.nanoquant`, unless this process has it already.

    It has, where a module of ours is removed and imported anew.

    Args:
        schema: PyTorch's, the name in front.
        cpu: what a CPU runs.
        cuda: what a GPU runs.
        fake: what tells the compiler the shape of the result.
    """
    namespace = torch.ops.nanoquant
    name = schema.partition("(")[0]
    if hasattr(namespace, name):
        return
    library = torch.library.Library("nanoquant", "FRAGMENT")
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, cpu, "CPU")
    library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"nanoquant::{name}", fake, lib=library)
    # A library that is collected takes its ops with it. The namespace object lives as long as the
    # process, which a global of this module would not if the module were removed and imported anew.
    setattr(namespace, f"{name}_library", library)


define_op(SCHEMA, _cpu, _cuda, _fake)


def w4a16(x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x [..., K] by a transposed int4 weight [N, K], add bias [N]: [..., N] in x.dtype.

    `bias` has x's dtype. x may have any strides, any leading dimensions and 0 tokens. On a CPU x
    has any floating dtype and the reference runs; on a CUDA device x is bf16 or fp16, and the
    number of tokens decides: at most DECODE_LIMIT `decode`, at most `fused_limit` `fused`, more
    `prefill`. The call may be captured in a CUDA graph after `warm_up`.

    Raises ValueError when shapes, dtypes or devices do not fit together.
    """
    require_columns(x, weight.in_features)
    return torch.ops.nanoquant.w4a16(
        x,
        weight.words,
        weight.scales,
        weight.arrivals,
        bias,
        weight.out_features,
        weight.group_size,
        weight.group_offset,
    )


def require_columns(x: torch.Tensor, in_features: int) -> None:
    """Refuse x of another K, which the op cannot see: the weight is padded, and x says what K is.

    Raises:
        ValueError: the last dimension of x is not K.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must be {in_features}")


def warm_up(
    weight: RuntimeWeight,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Compile and launch every kernel that serving this weight can need; on a CPU do nothing.

    One launch for each of the settings of each kernel: none is specialised on the number of tokens
    beyond that. With as few tokens as will do: vLLM lets PyTorch split no free block of 20 MiB and
    more while it loads, so that weights would take whole what large products leave behind. Once per
    shape and process; the scratch of `prefill` is reserved here too. Waits for the device, so that
    no kernel that loads weights early can see them unfinished.
    """
    device = weight.words.device
    if device.type != "cuda":
        return
    from vllm_nanoquant.kernels.prefill import reserve_scratch, scratch_bytes

    torch.cuda.synchronize(device)
    key = (device, weight.shape, weight.group_size, weight.group_offset, bias is None, dtype)
    if key in _warm:
        return
    reserve_scratch(device, scratch_bytes(weight, dtype.itemsize))
    below = (DECODE_LIMIT, *fused_buckets(weight, device)[:-1])
    x = torch.zeros((below[-1] + 1, weight.in_features), dtype=dtype, device=device)
    for tokens in (1, DECODE_LIMIT, *(each + 1 for each in below)):
        w4a16(x[:tokens], weight, bias)
    *_, prefill = _kernels()
    with launching_on(device):
        prefill(x, weight, bias)
    _warm.add(key)
