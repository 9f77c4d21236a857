# SPDX-License-Identifier: Apache-2.0
"""Layers of a model that vLLM has loaded already: which become int4, and how they do in place.

Everything that can be refused is refused by ``plan_replacements``, before a layer is touched.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_nanoquant.layers.linear import Int4Product
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.recipe import METHOD, Recipe, RecipeError, Scheme
from vllm_nanoquant.roles import layer_kinds

_UNQUANTIZED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
_HALF = (torch.bfloat16, torch.float16)
# Columns of a weight that are read back at a time where a CPU has repacked it.
_COLUMNS_READ = 1024

# Device memory beside the result that replacing a layer may take: temporaries of quantizing and of
# laying out, the scratch of the prefill kernel, and x and y of the largest product that warms up.
_SPARE_BYTES = 512 << 20


@dataclass(frozen=True)
class Replacement:
    """One layer that is to become int4."""

    name: str
    """vLLM's full name of it."""
    layer: torch.nn.Module
    scheme: Scheme
    dtype: torch.dtype
    """Of its weight and its activations."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of this rank's weight."""
        rows = getattr(self.layer, "num_embeddings_per_partition", None)
        if rows is None:
            return self.layer.output_size_per_partition, self.layer.input_size_per_partition
        return rows, self.layer.embedding_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is."""
        rows, columns = self.shape
        return rows * columns * self.dtype.itemsize


@dataclass
class Plan:
    """What becomes of the layers of one rank's model."""

    replacements: list[Replacement] = field(default_factory=list)
    """Smallest first: what one frees is there for the next."""
    left: dict[str, str] = field(default_factory=dict)
    """Why a module that the recipe names stays as it is, by its name."""


class ReplacedLinearMethod(Int4Product):
    """Multiplies by a weight that was quantized after the model had been loaded."""

    def create_weights(self, *_: Any, **__: Any) -> None:
        """Never called: the layer is there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{METHOD}: {self.prefix} was replaced in a loaded model")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse weights that are loaded again: they would not reach the int4 tensors.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{METHOD}: {self.prefix} became int4 in a model that was loaded already, and cannot "
            "be loaded again; start the engine anew, with --quantization nanoquant_w4a16 where "
            "weights are to be reloaded"
        )

    def take_over(self, layer: torch.nn.Module, weight: torch.Tensor) -> int:
        """Quantize W [N, K], give the layer the result, drop what it had; bytes of the result.

        Up to the last step the layer multiplies by what it had.
        """
        bias = getattr(layer, "bias", None)
        if bias is not None and bias.dtype != self.dtype:  # vLLM on a CPU keeps it in fp32
            bias.data = bias.data.to(self.dtype)
        quantized = quantize(weight, self.scheme.group_size, self.scheme.algorithm, self.device)
        nbytes = self._keep(layer, quantized)
        layer.quant_method = self
        old = layer.weight
        del layer.weight
        # vLLM may still hold the parameter, for a reload; its memory is wanted now.
        old.data = old.data.new_empty(0)
        if hasattr(layer, "cpu_linear"):
            del layer.cpu_linear
        return nbytes


def plan_replacements(model: torch.nn.Module, recipe: Recipe, hf_config: Any) -> Plan:
    """Choose the layers of one rank's model that become int4, and check that they can.

    Args:
        model: vLLM's model, weights loaded.
        recipe: its patterns name vLLM's modules: `qkv_proj`, not `q_proj`.
        hf_config: the model's config, for the kinds of its layers and tied embeddings.

    Raises:
        RecipeError: patterns that match nothing, or a recipe that needs what is not known here.
        TypeError: a model without linear layers of vLLM.
        ValueError: a weight that is not finite, or a device without room for the first steps.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(module, LinearBase | ParallelLMHead) for module in modules.values()):
        raise TypeError(
            f"{METHOD}: {type(model).__name__} has no linear layers of vLLM; outside vLLM use "
            "vllm_nanoquant.W4A16Linear.from_linear"
        )
    if recipe.algorithm == "gptq":
        raise RecipeError(
            f"{METHOD}: algorithm 'gptq' needs calibration text and cannot quantize a loaded "
            "model; use 'mse', or 'nanoquant quantize' and serve the result"
        )
    recipe.check_against(
        name
        for name, module in modules.items()
        if next(module.parameters(recurse=False), None) is not None
    )
    plan = Plan()
    kinds = layer_kinds(hf_config)
    tied = _tied_weights(modules.values(), hf_config)
    for name, module in modules.items():
        if isinstance(module, RoutedExperts):
            if recipe.scheme(f"{name}.up_proj", kinds):
                plan.left[name] = "routed experts"
        elif isinstance(module, LinearBase | ParallelLMHead):
            scheme = recipe.scheme(name, kinds)
            if scheme is not None:
                _consider(plan, Replacement(name, module, scheme, module.params_dtype), tied)
    plan.replacements.sort(key=lambda replacement: replacement.nbytes)
    _require_room(plan)
    for replacement in plan.replacements:
        _require_finite(replacement)
    return plan


def replace(replacement: Replacement) -> int:
    """Make one layer int4 in place; bytes of its int4 tensors."""
    weight = _weight_of(replacement)
    method = ReplacedLinearMethod(
        replacement.scheme, replacement.name, replacement.dtype, weight.device
    )
    return method.take_over(replacement.layer, weight)


def _tied_weights(modules: Iterable[torch.nn.Module], hf_config: Any) -> set[int] | None:
    """Identities of the embeddings' weights; None where the config ties the LM head to them."""
    if getattr(hf_config, "tie_word_embeddings", False):
        return None
    return {
        id(module.weight)
        for module in modules
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
        and hasattr(module, "weight")
    }


def _consider(plan: Plan, candidate: Replacement, tied: set[int] | None) -> None:
    """Put a layer that the recipe names on the right list."""
    layer, name = candidate.layer, candidate.name
    method = layer.quant_method
    if isinstance(method, Int4Product):
        plan.left[name] = "int4 already"
    elif type(method) not in _UNQUANTIZED:
        plan.left[name] = f"not unquantized: {type(method).__name__}"
    elif isinstance(layer, ParallelLMHead) and (tied is None or id(layer.weight) in tied):
        plan.left[name] = "shares the embedding's weights"
    elif candidate.dtype not in _HALF and layer.weight.device.type != "cpu":
        plan.left[name] = f"weights in {candidate.dtype}"
    else:
        plan.replacements.append(candidate)


def _require_room(plan: Plan) -> None:
    """Refuse to begin what would end in the middle for want of device memory.

    Raises:
        ValueError: with the sizes, and the way out.
    """
    device = next((item.layer.weight.device for item in plan.replacements), None)
    if device is None or device.type != "cuda":
        return
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    for item in plan.replacements:
        rows, columns = item.shape
        result = rows * columns * 5 // 8
        needed = result + _SPARE_BYTES
        if needed > free:
            raise ValueError(
                f"{METHOD}: replacing {item.name} needs up to {needed / 1e6:.0f} MB of device "
                f"memory for a moment, and {free / 1e6:.0f} MB will be free; start the engine "
                "with a smaller gpu_memory_utilization, or serve with --quantization "
                "nanoquant_w4a16"
            )
        free += item.nbytes - result


def _require_finite(replacement: Replacement) -> None:
    """Refuse a weight with NaN or infinity, before another layer has been replaced.

    Raises:
        ValueError: how many weights, and the first row.
    """
    weight = _weight_of(replacement)
    low, high = weight.aminmax()  # NaN in the weight gives NaN
    if bool(torch.isfinite(high.double() - low.double())):
        return
    try:
        quantize(weight, replacement.scheme.group_size, "minmax")
    except ValueError as error:
        raise ValueError(f"{METHOD}: {replacement.name}.weight: {error}") from error


def _weight_of(replacement: Replacement) -> torch.Tensor:
    """This rank's weight [N, K].

    On a CPU vLLM repacks a weight for its matrix library and drops it. Multiplying by the identity
    gives it back exactly: every sum has one term that is not 0.
    """
    layer = replacement.layer
    if layer.weight.numel():
        return layer.weight.data
    rows, columns = replacement.shape
    weight = torch.empty((rows, columns), dtype=replacement.dtype)
    for first in range(0, columns, _COLUMNS_READ):
        count = min(_COLUMNS_READ, columns - first)
        unit = torch.zeros((count, columns), dtype=replacement.dtype)
        unit[:, first : first + count].fill_diagonal_(1)
        weight[:, first : first + count] = layer.quant_method.apply(layer, unit).t()
    return weight
