# SPDX-License-Identifier: Apache-2.0
"""Which method a layer gets, by its class and by the recipe."""

from collections.abc import Callable, Sequence

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_nanoquant import compat
from vllm_nanoquant.checkpoint.stored import Int4Module
from vllm_nanoquant.layers.experts import NanoquantExpertsMethod, leaves_of, why_not_served
from vllm_nanoquant.layers.linear import NanoquantLinearMethod
from vllm_nanoquant.layers.stored_experts import StoredExpertsMethod
from vllm_nanoquant.layers.stored_linear import StoredLinearMethod
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.recipe import METHOD, RecipeError, Scheme

logger = compat.init_logger(__name__)


def method_for(
    layer: torch.nn.Module,
    prefix: str,
    scheme_for: Callable[[str], Scheme | None],
    ledger: Ledger,
    stored_as: Callable[[str], Sequence[Int4Module] | None] = lambda _: None,
) -> QuantizeMethodBase | None:
    """Method of one layer.

    Args:
        layer: the layer that vLLM is building.
        prefix: vLLM's full name of it.
        scheme_for: the recipe's scheme of a module by its name.
        ledger: keeps count of what is quantized.
        stored_as: what the checkpoint's headers say of a module that is int4 there, by its name;
            None for one that is to be quantized while it loads.

    Returns:
        Our methods for what the recipe covers; vLLM's unquantized one for other linear layers;
        None for anything else, which vLLM takes as "leave it alone".

    Raises:
        RecipeError: the recipe splits modules that are served as one.
    """
    if isinstance(layer, RoutedExperts):
        return _method_for_experts(layer, prefix, scheme_for, ledger, stored_as)
    if not isinstance(layer, LinearBase | ParallelLMHead):
        return None
    scheme = scheme_for(prefix)
    if scheme is not None:
        headers = stored_as(prefix)
        if headers is not None:
            return StoredLinearMethod(scheme, prefix, ledger, headers)
        return NanoquantLinearMethod(scheme, prefix, ledger)
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _method_for_experts(
    layer: RoutedExperts,
    prefix: str,
    scheme_for: Callable[[str], Scheme | None],
    ledger: Ledger,
    stored_as: Callable[[str], Sequence[Int4Module] | None],
) -> QuantizeMethodBase | None:
    """Method of a layer's routed experts, which all need the same scheme."""
    experts = range(layer.moe_config.num_logical_experts)
    modules = [
        f"{prefix}.{expert}.{leaf}" for expert in experts for leaf in leaves_of(layer).values()
    ]
    schemes = {module: scheme_for(module) for module in modules}
    scheme = schemes[modules[0]]
    other = next((module for module in modules if schemes[module] != scheme), None)
    if other is not None:
        raise RecipeError(
            f"{METHOD}: the experts of {prefix} are served together and need the same treatment, "
            f"but {modules[0]} and {other} get different ones; name all of them, or none, in "
            "ignore and overrides"
        )
    if scheme is None:
        return None
    stored = [stored_as(module) for module in modules]
    reason = why_not_served(layer)
    if reason is not None and stored[0] is not None:
        raise RecipeError(
            f"{METHOD}: the experts of {prefix} are int4 in the checkpoint and cannot be served: "
            f"{reason}; run 'nanoquant quantize' on the original with ignore [\"*.experts.*\"]"
        )
    if reason is not None:
        logger.warning("%s: the experts of %s stay as they are: %s", METHOD, prefix, reason)
        return None
    if stored[0] is None:
        return NanoquantExpertsMethod(layer, scheme, prefix, ledger)
    headers = [header for found in stored for header in found or ()]
    return StoredExpertsMethod(layer, scheme, prefix, ledger, headers)
