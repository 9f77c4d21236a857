# SPDX-License-Identifier: Apache-2.0
"""Parameters whose loader vLLM replaces after it has built their layer.

A Mamba mixer with one B/C group gives every tensor-parallel rank a copy of that group. To do so it
puts a loader of its own in the place of the one that `in_proj.weight` has (and from vLLM 0.32 on of
the one that `in_proj.weight_scale` has). That would push out the loader which collects a layer's
weights until they are complete, and the layer would be quantized from memory that nobody filled.
So a parameter here takes a new loader, and has it wrapped as the first one was.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_nanoquant import compat

Loader = Callable[..., Any]


class ReplaceableLoader(BasevLLMParameter):
    """A parameter whose loader may be replaced as long as it is on the meta device."""

    layer: Callable[[], torch.nn.Module | None] = staticmethod(lambda: None)
    """The parameter's layer, by a weak reference: vLLM keeps loaders in a table by layer."""

    def belongs_to(self, layer: torch.nn.Module) -> None:
        """Name the layer whose weights are collected."""
        self.layer = weakref.ref(layer)

    @property
    def weight_loader(self) -> Loader:
        """What vLLM calls with this parameter and a tensor of the checkpoint."""
        return super().weight_loader

    @weight_loader.setter
    def weight_loader(self, loader: Loader) -> None:
        layer = self.layer()
        is_new = layer is not None and self.is_meta and not compat.collects_weights(loader)
        self._set(self.adapted(loader) if is_new else loader)
        if is_new:
            compat.process_when_loaded(layer)

    @weight_loader.deleter
    def weight_loader(self) -> None:
        BasevLLMParameter.weight_loader.fdel(self)

    def _set(self, loader: Loader) -> None:
        BasevLLMParameter.weight_loader.fset(self, loader)

    def adapted(self, loader: Loader) -> Loader:
        """Turn a loader for a BF16 weight [N, K] into one for this parameter."""
        return loader


class LoaderRelay(ReplaceableLoader):
    """An empty parameter in the place of the BF16 weight; hands a new loader to the real ones."""

    def adapted(self, loader: Loader) -> Loader:
        """Give the loader to the layer's other parameters; what this one has is never called."""
        layer = self.layer()
        for parameter in () if layer is None else layer.parameters(recurse=False):
            if isinstance(parameter, ReplaceableLoader) and parameter is not self:
                parameter.weight_loader = loader
        return loader


def repeats_single_group(layer: torch.nn.Module, prefix: str) -> bool:
    """Whether a layer is a Mamba in_proj whose one B/C group every rank has a copy of."""
    single = type(layer) is ColumnParallelLinear and prefix.endswith(".in_proj")
    return single and layer.tp_size > 1
