# SPDX-License-Identifier: Apache-2.0
"""A foreign checkpoint's tensors in, ours out, one module at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.formats.base import (
    Converted,
    Format,
    FormatError,
    Tensors,
    is_servable,
    some,
)
from vllm_nanoquant.checkpoint.formats.integers import dequantize

logger = logging.getLogger(__name__)

_PLAIN_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)


def read_module(fmt: Format, module: str, tensors: Tensors) -> Converted | torch.Tensor:
    """One module of a foreign checkpoint: our integers, or a dense bf16 weight [N, K].

    Integers of a module that our method does not serve in int4 (routed experts, modules without a
    role) come back as a dense weight.

    Args:
        fmt: the checkpoint's format.
        module: name in the source.
        tensors: all of the module's tensors that its storage needs, on one device.

    Raises:
        FormatError: they do not fit one another or the config.
    """
    stored = fmt.modules[module]
    result = stored.read(module, tensors)
    if isinstance(result, Converted) and not is_servable(stored.name or module):
        return dequantize(result)
    return result


def tensors_of(module: str, result: Converted | torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a module on disk, by full name; `module` is its name in the result."""
    if isinstance(result, torch.Tensor):
        return {module + naming.WEIGHT: result}
    tensors = {
        module + naming.PACKED: result.weight.packed,
        module + naming.SCALE: result.weight.scale,
        module + naming.ZERO_POINT: result.weight.zero_point,
    }
    if result.order is not None:
        tensors[module + naming.ORDER] = result.order
    return tensors


def translate(
    fmt: Format,
    stream: Iterable[tuple[str, torch.Tensor]],
    device: torch.device | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """A foreign checkpoint's tensors in any order in, ours out, each module once it is complete.

    Tensors of modules that are not quantized pass as they are. Only incomplete modules are kept.

    Args:
        fmt: the checkpoint's format, of `formats.detect`.
        stream: names and tensors as the source has them.
        device: where modules are converted; by default where their tensors are.

    Raises:
        FormatError: at the end, for modules of which only a part came; before, for tensors that
            do not fit, come twice, or are of a dtype that only a quantized module can have.
    """
    tell_dropped(fmt)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stream:
        if name in fmt.dropped:
            continue
        module, _, suffix = name.rpartition(".")
        stored = fmt.modules.get(module)
        if stored is None or suffix not in stored.suffixes:
            yield name, check_plain(name, tensor)
            continue
        parts = waiting.setdefault(module, {})
        if suffix in parts:
            raise FormatError(f"{name} came twice before its module was complete")
        parts[suffix] = tensor if device is None else tensor.to(device)
        if len(parts) == len(stored.suffixes):
            result = read_module(fmt, module, waiting.pop(module))
            yield from tensors_of(stored.name or module, result).items()
    if waiting:
        lacking = [
            f"{module}.{suffix}"
            for module, parts in waiting.items()
            for suffix in fmt.modules[module].suffixes - parts.keys()
        ]
        raise FormatError(
            f"{len(waiting)} modules are incomplete: {some(lacking)} never came; a shard of the "
            "checkpoint is missing"
        )


def tell_dropped(fmt: Format) -> None:
    """Log which tensors have no counterpart in the result."""
    if fmt.dropped:
        logger.info("%d tensors have no use here: %s", len(fmt.dropped), some(fmt.dropped))


def check_plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; raises FormatError for a dtype that means nothing without a scale."""
    if tensor.dtype not in _PLAIN_DTYPES:
        raise FormatError(
            f"{name} is {tensor.dtype}, and nothing in the checkpoint says what its scale is; such "
            "a tensor cannot be read"
        )
    return tensor
