# SPDX-License-Identifier: Apache-2.0
"""int4 weights, bf16 activations for hybrid Mamba-Transformers in vLLM.

Importing this package is cheap on purpose: vLLM loads every installed plugin in every process, so
nothing here imports torch, Triton or vLLM. Public names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_nanoquant.config import NanoquantConfig
    from vllm_nanoquant.plugin import register
    from vllm_nanoquant.recipe import Recipe

__version__ = "0.1.0"

__all__ = ["NanoquantConfig", "Recipe", "__version__", "register"]

_HOMES = {
    "NanoquantConfig": "vllm_nanoquant.config",
    "Recipe": "vllm_nanoquant.recipe",
    "register": "vllm_nanoquant.plugin",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
