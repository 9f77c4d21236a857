# SPDX-License-Identifier: Apache-2.0
"""int4 weights, bf16 activations for hybrid Mamba-Transformers in vLLM.

Importing this package is cheap on purpose: vLLM loads every installed plugin in every process, so
nothing here imports torch, Triton or vLLM. Public names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_nanoquant.config import NanoquantConfig
    from vllm_nanoquant.nn import W4A16Linear, quantize_w4, w4a16_linear
    from vllm_nanoquant.plugin import register
    from vllm_nanoquant.recipe import Recipe
    from vllm_nanoquant.serving.patch import PatchReport, patch_nemotron_h

__version__ = "0.1.0"

__all__ = [
    "NanoquantConfig",
    "PatchReport",
    "Recipe",
    "W4A16Linear",
    "__version__",
    "patch_nemotron_h",
    "quantize_w4",
    "register",
    "w4a16_linear",
]

_HOMES = {
    "NanoquantConfig": "vllm_nanoquant.config",
    "PatchReport": "vllm_nanoquant.serving.patch",
    "Recipe": "vllm_nanoquant.recipe",
    "W4A16Linear": "vllm_nanoquant.nn",
    "patch_nemotron_h": "vllm_nanoquant.serving.patch",
    "quantize_w4": "vllm_nanoquant.nn",
    "register": "vllm_nanoquant.plugin",
    "w4a16_linear": "vllm_nanoquant.nn",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
