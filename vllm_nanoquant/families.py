# SPDX-License-Identifier: Apache-2.0
"""Families of models where names alone do not tell what a module is.

vLLM builds each layer with a name, and asks by it how to quantize the layer. In three families that
is not the name under which the layer's weights are loaded: Granite 4 hybrids call their Mamba
mixers ``mixer``, Falcon-H1 counts its Mamba mixers on from the last layer, and Zamba2 gives all of
its shared transformer blocks one name. Recipes and checkpoints know the latter name, so it is
found here. The rules hold for vLLM 0.26 to 0.33; a name that no rule knows stays as it is.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

_UNQUANTIZED_HEADS = frozenset({"falcon_h1", "zamba2"})
_MIXER = re.compile(r"(?:model\.)?(\d+)\.mixer\.(\w+)")
_SHARED_BLOCK = re.compile(r"model\.(qkv_proj|o_proj|feed_forward\.(?:gate_up_proj|down_proj))")


def keeps_lm_head(hf_config: Any) -> bool:
    """Whether the LM head stays as it is, whatever the recipe says.

    It does where it shares the embedding's weights, and in the families whose LM head vLLM builds
    without asking how to quantize it (0.26 to 0.33).

    Args:
        hf_config: a Hugging Face model config, or the part of one that describes the text model.
    """
    tied = bool(getattr(hf_config, "tie_word_embeddings", False))
    return tied or str(getattr(hf_config, "model_type", "")) in _UNQUANTIZED_HEADS


@dataclass(frozen=True)
class LayerNames:
    """The checkpoint's names for the layers of one model. Plain data: vLLM sends it to its workers.

    Attributes:
        family: ``model_type`` of the model's config.
        layers: number of decoder layers.
        shared: layers with a shared transformer block, of Zamba2 alone.
        blocks: number of different shared transformer blocks, of Zamba2 alone.
    """

    family: str = ""
    layers: int = 0
    shared: tuple[int, ...] = ()
    blocks: int = 1

    @classmethod
    def of(cls, hf_config: Any) -> Self:
        """Read what is needed of a model's config; of most families, nothing is."""
        family = str(getattr(hf_config, "model_type", ""))
        if family not in _RULES:
            return cls()
        return cls(
            family,
            int(getattr(hf_config, "num_hidden_layers", None) or 0),
            tuple(getattr(hf_config, "hybrid_layer_ids", None) or ()),
            int(getattr(hf_config, "num_mem_blocks", None) or 1),
        )

    def names(self, prefix: str) -> tuple[str, ...]:
        """Names of the layers that vLLM builds under `prefix`, in the order in which it does."""
        rule = _RULES.get(self.family)
        return (rule(self, prefix) if rule else ()) or (prefix,)

    def _granite(self, prefix: str) -> tuple[str, ...]:
        return (re.sub(r"(\.layers\.\d+)\.mixer\.", r"\1.mamba.", prefix),)

    def _falcon(self, prefix: str) -> tuple[str, ...]:
        if mixer := _MIXER.fullmatch(prefix):
            return (f"model.layers.{int(mixer[1]) - self.layers}.mamba.{mixer[2]}",)
        return (re.sub(r"(\.layers\.\d+)\.(qkv_proj|o_proj)$", r"\1.self_attn.\2", prefix),)

    def _zamba(self, prefix: str) -> tuple[str, ...]:
        if mixer := _MIXER.fullmatch(prefix):
            layer = int(mixer[1]) - len(self.shared)
            decoder = "mamba_decoder." if layer in self.shared else ""
            return (f"model.layers.{layer}.{decoder}mamba.{mixer[2]}",)
        if linear := re.fullmatch(r"(\d+)\.linear", prefix):
            return (f"model.layers.{int(linear[1]) - len(self.shared)}.linear",)
        if block := _SHARED_BLOCK.fullmatch(prefix):
            part = block[1] if "." in block[1] else f"self_attn.{block[1]}"
            firsts = self.shared[: self.blocks]
            return tuple(f"model.layers.{i}.shared_transformer.{part}" for i in firsts)
        return ()


_RULES: Mapping[str, Callable[[LayerNames, str], tuple[str, ...]]] = {
    "granitemoehybrid": LayerNames._granite,
    "falcon_h1": LayerNames._falcon,
    "zamba2": LayerNames._zamba,
}
