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
from vllm_nanoquant.layers.linear import NanoquantLinearMethod
from vllm_nanoquant.layers.stored_linear import StoredLinearMethod
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.recipe import METHOD, Scheme

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
    """
    if isinstance(layer, RoutedExperts) and scheme_for(f"{prefix}.up_proj"):
        logger.warning_once(
            "%s: routed experts cannot be quantized yet and stay as they are", METHOD
        )
    if not isinstance(layer, LinearBase | ParallelLMHead):
        return None
    scheme = scheme_for(prefix)
    if scheme is not None:
        headers = stored_as(prefix)
        if headers is not None:
            return StoredLinearMethod(scheme, prefix, ledger, headers)
        return NanoquantLinearMethod(scheme, prefix, ledger)
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
