# SPDX-License-Identifier: Apache-2.0
"""Small int4 checkpoints, written by nothing but the number format and safetensors."""

import json
import shutil

from safetensors.torch import load_file, save_file

from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import METHOD, Recipe
from vllm_nanoquant.roles import layer_kinds


class _Attributes:
    def __init__(self, values):
        self.__dict__.update(values)


def int4_tensors(module, weight, group_size):
    """The checkpoint's tensors of one int4 module, by name."""
    quantized = quantize_mse(weight, group_size)
    return {
        f"{module}.weight_packed": quantized.packed,
        f"{module}.weight_scale": quantized.scale,
        f"{module}.weight_zero_point": quantized.zero_point,
    }


def reorder(tensors, module, weight, group_size, order):
    """The same module as GPTQ's activation order leaves it: columns permuted, then grouped."""
    return (
        tensors
        | int4_tensors(module, weight[:, order], group_size)
        | {f"{module}.weight_order": order.int()}
    )


def write_int4(source, target, change=lambda tensors: tensors, **recipe):
    """Copy a BF16 checkpoint to `target`, int4 by the recipe; `change` has the last word."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    parsed = Recipe(**recipe)
    kinds = layer_kinds(_Attributes(config))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        scheme = parsed.scheme(module, kinds) if name.endswith(".weight") else None
        tensors |= int4_tensors(module, tensor, scheme.group_size) if scheme else {name: tensor}
    save_file(change(tensors), target / "model.safetensors")
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format_version": 1,
        **parsed.model_dump(mode="json"),
        "producer": {"name": "vllm-nanoquant", "version": "0"},
    }
    (target / "config.json").write_text(json.dumps(config))
    return target
