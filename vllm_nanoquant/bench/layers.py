# SPDX-License-Identifier: Apache-2.0
"""The shapes that are timed: given as N x K, or those of a model's layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_nanoquant.checkpoint.errors import UsageError, printable

_SHAPE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Layer:
    """A weight [N, K].

    Attributes:
        name: what results call it.
        n: output features.
        k: input features.
        count: how many layers of the model have this shape.
    """

    name: str
    n: int
    k: int
    count: int = 1


def parse_shape(text: str) -> Layer:
    """The layer that ``4480x10240`` (N x K) stands for.

    Raises:
        ValueError: another form.
    """
    found = _SHAPE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a shape NxK such as 4480x10240")
    return Layer(text, int(found[1]), int(found[2]))


def layers_of(model: str) -> list[Layer]:
    """The different products of a model that can be int4, as vLLM joins them; no weight is read.

    Args:
        model: folder, or model id of the Hugging Face Hub.

    Raises:
        UsageError: it cannot be had, or has no such layer.
        CheckpointError: a header is damaged.
    """
    # Not at the top: these import torch.
    from vllm_nanoquant.checkpoint.naming import WEIGHT, is_routed_expert
    from vllm_nanoquant.roles import role_of

    shapes: Shapes = {}
    for name, shape in _tensor_shapes(model).items():
        module = name.removesuffix(WEIGHT)
        wanted = name.endswith(WEIGHT) and role_of(module) and not is_routed_expert(module)
        if wanted and len(shape) == 2:
            shapes[module] = (shape[0], shape[1])
    layers: dict[tuple[str, int, int], int] = {}
    for module, (n, k) in _joined(shapes).items():
        key = (module.rpartition(".")[2], n, k)
        layers[key] = layers.get(key, 0) + 1
    if not layers:
        raise UsageError(
            f"{printable(model)} has no BF16 weight that could be int4; routed experts, and "
            "weights that are quantized already, are not timed"
        )
    return [Layer(name, n, k, count) for (name, n, k), count in layers.items()]


def _joined(shapes: Shapes) -> Shapes:
    """The same, with q, k and v as one product, and gate and up, as vLLM serves them."""
    from vllm_nanoquant.inventory import USUAL_FUSIONS

    part_of = {part: whole for whole, parts in USUAL_FUSIONS.items() for part in parts}
    joined: Shapes = {}
    for module, (n, k) in shapes.items():
        parent, dot, leaf = module.rpartition(".")
        whole = part_of.get(leaf)
        parts = [f"{parent}{dot}{part}" for part in USUAL_FUSIONS.get(whole or "", [])]
        name = f"{parent}{dot}{whole}" if whole and all(p in shapes for p in parts) else module
        joined[name] = (joined.get(name, (0, k))[0] + n, k)
    return joined


def _tensor_shapes(model: str) -> Mapping[str, tuple[int, ...]]:
    from vllm_nanoquant.checkpoint.header import read_header

    folder = Path(model)
    if folder.is_dir():
        headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
        return {
            name: tuple(entry.shape) for header in headers for name, entry in header.tensors.items()
        }
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(model)
    except (HFValidationError, HfHubHTTPError, NotASafetensorsRepoError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{printable(model)!r} is not a folder, and its headers cannot be had of the Hub: "
            f"{printable(lines[0])}"
        ) from None
    return {
        name: tuple(tensor.shape)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
