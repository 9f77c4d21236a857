# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools quantized: found by config and names, read module by module.

fmt = detect(config, names)              # None: nothing to translate
for name, tensor in translate(fmt, stream): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from vllm_nanoquant.checkpoint.formats import awq, compressed, gptq, modelopt, redhelix
from vllm_nanoquant.checkpoint.formats.base import (
    ACTIVATION_TENSORS,
    Converted,
    Format,
    FormatError,
    Layout,
    ModuleScheme,
    StoredModule,
)
from vllm_nanoquant.checkpoint.formats.stream import read_module, tensors_of, translate
from vllm_nanoquant.recipe import METHOD

__all__ = [
    "SIDE_CONFIGS",
    "Converted",
    "Format",
    "FormatError",
    "Layout",
    "ModuleScheme",
    "StoredModule",
    "detect",
    "read_module",
    "tensors_of",
    "translate",
    "with_side_configs",
]

_READABLE = "AWQ, GPTQ, compressed-tensors, ModelOpt, fp8 and redhelix/nanoquant"
_DETECTORS = (awq.detect, gptq.detect, compressed.detect, modelopt.detect)

SIDE_CONFIGS: dict[str, str] = {
    "quantization_config.json": "redhelix/nanoquant",
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Files beside config.json in which tools wrote their settings, and who does it."""


def detect(config: Mapping[str, object], names: Iterable[str]) -> Format | None:
    """Find out whether another tool quantized a checkpoint, and how.

    Args:
        config: config.json; `with_side_configs` fills in what older tools wrote elsewhere.
        names: of every tensor in the checkpoint.

    Returns:
        The format; None for a checkpoint that is not quantized, or that is ours.

    Raises:
        FormatError: quantized in a way that cannot be read, or incomplete.
    """
    every = list(names)
    options = _options(config)
    if options.get("quant_method") == METHOD:
        return None
    found = redhelix.detect(options, every)
    if found is None and (not options or options.get("quant_type") == "w4a16"):
        return None
    for detector in _DETECTORS:
        found = found or detector(options, every)
    if found is None:
        raise FormatError(
            f"quantization_config.quant_method is {options.get('quant_method')!r}; what can be "
            f"read is {_READABLE}. Quantize the unquantized model instead: nanoquant quantize"
        )
    if not found.modules:
        raise FormatError(
            f"config.json says that the checkpoint is quantized by {found.name}, but no tensor is "
            "stored in its way; remove quantization_config if the weights are not quantized"
        )
    activations = {name for name in every if name.rpartition(".")[2] in ACTIVATION_TENSORS}
    return replace(found, dropped=found.dropped | activations)


def with_side_configs(
    config: Mapping[str, object], read: Callable[[str], Mapping[str, object] | None]
) -> dict[str, object]:
    """config.json with the `quantization_config` that an older tool wrote to a file of its own.

    Args:
        config: config.json.
        read: content of a file of the checkpoint by name, or None where there is none; called for
            the names in `SIDE_CONFIGS`, and only if config.json is silent.
    """
    result = dict(config)
    if _options(config):
        return result
    for file, method in SIDE_CONFIGS.items():
        content = read(file)
        if content is None:
            continue
        options = dict(content)
        inner = options.get("quantization")
        if isinstance(inner, Mapping):
            options = dict(inner)
        if file == "quantization_config.json" and "quant_method" not in options:
            result["quantization_config"] = options
        else:
            result["quantization_config"] = {"quant_method": method} | options
        return result
    return result


def _options(config: Mapping[str, object]) -> Mapping[str, object]:
    """The quantization settings in a config.json, those of its text model included."""
    for holder in (config, config.get("text_config")):
        if not isinstance(holder, Mapping):
            continue
        for key in ("quantization_config", "compression_config"):
            options = holder.get(key)
            if options is None:
                continue
            if not isinstance(options, Mapping):
                raise FormatError(f"{key} in config.json is {options!r}; it must be an object")
            return options
    return {}
