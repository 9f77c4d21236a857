# SPDX-License-Identifier: Apache-2.0
"""int4 linear layers outside vLLM: quantize a weight, multiply by it, or replace an ``nn.Linear``.

The number format, the layout and the kernels are those of the plugin; vLLM need not be installed.
For inference: there are no gradients.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from vllm_nanoquant.kernels.layout import ARRIVALS_PER_BLOCK, RuntimeWeight, runtime_shapes
from vllm_nanoquant.kernels.ops import require_columns, w4a16
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.quantize.groups import validate_group

__all__ = ["W4A16Linear", "quantize_w4", "w4a16_linear"]


@torch.no_grad()
def quantize_w4(
    weight: torch.Tensor,
    group_size: int = 128,
    algorithm: str = "mse",
    device: torch.device | str | None = None,
) -> RuntimeWeight:
    """Quantize a weight to int4, in the layout of the kernels.

    Args:
        weight: W [N, K] in bf16, fp16 or fp32, as ``nn.Linear.weight``; left as it is.
        group_size: input columns that share a scale and a zero point: 32, 64, 128, or -1 for one
            group per row. The last group is ragged where the size does not divide K.
        algorithm: ``mse``, a search of the range with the least squared error, or ``minmax``.
        device: where to quantize, and where the result lies; by default where the weight is. Rows
            of a weight on another device are sent over a few at a time.

    Raises:
        ValueError: no such algorithm or group size, another dtype, or a weight that is empty, on
            the meta device, or not finite.
    """
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values; load it first")
    target = None if device is None else torch.device(device)
    return RuntimeWeight.from_quantized(quantize(weight, group_size, algorithm, target))


def w4a16_linear(
    x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by an int4 weight: x W^T + bias, as ``torch.nn.functional.linear``.

    On a GPU the same call gives the same bits, and up to 16 tokens a row of the result does not
    depend on the other rows. Products on one device share a buffer, those with one weight its
    counters: they belong on one stream. `torch.compile` sees one op.

    Args:
        x: [..., K], any strides; bf16 or fp16, on a CPU any floating dtype. Sums are in fp32.
        weight: an int4 weight [N, K], of ``quantize_w4``, on the device of x.
        bias: [N] in x's dtype, or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: a gradient is asked for, by an input that requires one.
    """
    _check_input(x, weight.in_features, bias)
    return w4a16(x, weight, bias)


def _check_input(x: torch.Tensor, in_features: int, bias: torch.Tensor | None) -> None:
    """Refuse what the op cannot see: it is given no K, and would drop gradients."""
    require_columns(x, in_features)
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; it must be torch.bfloat16 or torch.float16")
    wants_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
    if wants_gradient and torch.is_grad_enabled():
        raise RuntimeError(
            "the int4 product has no gradient; call it under torch.no_grad() or "
            "torch.inference_mode(), or detach its inputs"
        )


class W4A16Linear(nn.Module):
    """A linear layer with an int4 weight: y [..., N] = x [..., K] W^T + bias.

    Every tensor is a buffer: the layer has nothing to train. ``state_dict()`` holds

    - ``weight_packed`` int32 [ceil(N/64), ceil(K/128), 4, 256], the integers in the order in which
      the kernels take them;
    - ``weight_scale`` int32 [chunks of 128 columns, tiles of 16 rows, 8, 2, groups per chunk], each
      a bf16 scale and a bf16 zero point;
    - ``weight_shape`` int64 [3]: N, K and the group size, compared when a state is loaded;
    - ``bias`` [N], where there is one.

    ``to(dtype)`` changes the dtype of the bias, which is that of x; the weight stays int4.

    Attributes:
        in_features: K.
        out_features: N.
        group_size: input columns per scale, or -1 for one group per row.
        bias: [N], or None.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_arrivals: torch.Tensor
    weight_shape: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Make a layer of zeros, to be filled by ``load_state_dict``.

        Args:
            in_features: K.
            out_features: N.
            bias: whether there is one.
            group_size: input columns per scale: 32, 64, 128 or -1.
            device: of all tensors.
            dtype: of the bias.

        Raises:
            ValueError: no such group size, or a layer without elements.
        """
        super().__init__()
        validate_group(group_size, 0)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a weight [{out_features}, {in_features}] has no elements")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        words, scales = runtime_shapes(out_features, in_features, group_size)
        whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.register_buffer("weight_packed", torch.zeros(words, **whole))
        self.register_buffer("weight_scale", torch.zeros(scales, **whole))
        # 0 between products, so never saved.
        arrivals = torch.zeros(words[0] * ARRIVALS_PER_BLOCK, **whole)
        self.register_buffer("weight_arrivals", arrivals, persistent=False)
        shape = torch.tensor([out_features, in_features, group_size], device=device)
        self.register_buffer("weight_shape", shape)
        offset = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", offset)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        algorithm: str = "mse",
        device: torch.device | str | None = None,
    ) -> Self:
        """Quantize an ``nn.Linear``, which stays as it is and shares no memory with the result.

        Args:
            linear: weight [N, K] and bias [N] or none, in bf16, fp16 or fp32.
            group_size: input columns per scale: 32, 64, 128 or -1.
            algorithm: ``mse`` or ``minmax``.
            device: of the result; by default that of the weight.

        Raises:
            TypeError: something else than an ``nn.Linear``.
            ValueError: what ``quantize_w4`` refuses.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        weight = quantize_w4(linear.weight, group_size, algorithm, device)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            group_size=group_size,
            device=weight.words.device,
            dtype=linear.weight.dtype,
        )
        layer.weight_packed = weight.words
        layer.weight_scale = weight.scales
        layer.weight_arrivals = weight.arrivals
        if linear.bias is not None and layer.bias is not None:
            layer.bias = linear.bias.detach().to(layer.bias.device, copy=True)
        return layer.train(linear.training)

    @property
    def weight(self) -> RuntimeWeight:
        """The weight as ``w4a16_linear`` takes it; it shares the layer's memory."""
        return RuntimeWeight(
            self.weight_packed,
            self.weight_scale,
            self.weight_arrivals,
            self.out_features,
            self.in_features,
            self.group_size,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product of x [..., K]: [..., N] in x's dtype, which is the bias's; see `w4a16_linear`."""
        _check_input(x, self.in_features, self.bias)
        return torch.ops.nanoquant.w4a16(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_arrivals,
            self.bias,
            self.out_features,
            self.group_size,
            0,
        )

    def extra_repr(self) -> str:
        """Sizes and group size, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse the state of another layer: padding would let one of a similar size pass."""
        found = state_dict.get(f"{prefix}weight_shape")
        expected = [self.out_features, self.in_features, self.group_size]
        if found is not None and found.tolist() != expected:
            error_msgs.append(
                f"{prefix}weight_shape is {found.tolist()} (out_features, in_features, "
                f"group_size); this layer has {expected}"
            )
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        # Not part of a state: after `to_empty` it holds anything, after assigning it is on meta.
        if self.weight_arrivals.device == self.weight_packed.device:
            self.weight_arrivals.zero_()
        else:
            self.weight_arrivals = torch.zeros_like(
                self.weight_arrivals, device=self.weight_packed.device
            )
