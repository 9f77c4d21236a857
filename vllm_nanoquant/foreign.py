# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools quantized, served without converting them first.

The front end finds out how a checkpoint is stored and what becomes of each module; a worker turns
the tensors into ours on their way from the files to the model. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nanoquant.checkpoint.formats import (
    Format,
    FormatError,
    detect,
    translate,
    with_side_configs,
)
from vllm_nanoquant.checkpoint.formats.redhelix import WEIGHTS_FILE
from vllm_nanoquant.checkpoint.naming import ORDER, PACKED, ZERO_POINT
from vllm_nanoquant.checkpoint.stored import Int4Module
from vllm_nanoquant.recipe import METHOD, RecipeError, Scheme, ServingOptions
from vllm_nanoquant.roles import LayerKind, Role, role_of

_GROUP_INDICES = frozenset({"g_idx", "weight_g_idx"})
_TAKEN_OVER = "as stored"


@dataclass(frozen=True)
class ForeignWeights:
    """How a foreign checkpoint is served. Plain data: vLLM sends it to its workers.

    Attributes:
        format: how its modules are stored.
        schemes: what becomes int4, by module. Integers are taken over; what is stored as FP8 or
            NVFP4 is quantized again, all of it unless a preset is asked for. Everything else stays
            as it is.
        int4: the modules whose integers are taken over, by name.
    """

    format: Format
    schemes: Mapping[str, Scheme]
    int4: Mapping[str, Int4Module]

    def translate(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Turn a stream of the checkpoint's tensors into one of ours.

        A module that may have its columns in another order always gets a ``weight_order``: its
        layer was built with one, before the tensor that tells was read.

        Raises:
            FormatError: as ``formats.translate``, or columns in an order that config.json denies.
        """
        waiting: str | None = None
        columns = 0
        for name, tensor in _on_cpu(translate(self.format, weights)):
            module, _, leaf = name.rpartition(".")
            if f".{leaf}" == ORDER:
                if not self.int4[module].ordered:
                    raise FormatError(
                        f"{module} has its columns in the order of activations (g_idx), but "
                        "desc_act is false in config.json; set it to true"
                    )
                waiting = None
            elif waiting is not None and waiting != module:
                yield waiting + ORDER, _unordered(columns)
                waiting = None
            if f".{leaf}" == PACKED:
                columns = 2 * tensor.shape[0]  # act-order formats store multiples of eight
            elif f".{leaf}" == ZERO_POINT and module in self.int4 and self.int4[module].ordered:
                waiting = module
            yield name, tensor
        if waiting is not None:
            yield waiting + ORDER, _unordered(columns)


def _unordered(columns: int) -> torch.Tensor:
    return torch.arange(columns, dtype=torch.int32, device="cpu")


def _on_cpu(
    stream: Iterator[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Advance a stream with the CPU as default device; vLLM loads with the GPU as default."""
    while True:
        with torch.device("cpu"):
            item = next(stream, None)
        if item is None:
            return
        yield item


def find_foreign(
    config: Mapping[str, Any],
    tensors: Iterable[str],
    read_json: Callable[[str], Mapping[str, Any] | None],
    options: ServingOptions,
    kinds: Sequence[LayerKind] | None,
    tied_embeddings: bool,
) -> ForeignWeights | None:
    """Find out whether another tool quantized a checkpoint, and how it is served then.

    Args:
        config: its config.json.
        tensors: names of all of its tensors.
        read_json: content of a JSON file of the checkpoint by name, or None.
        options: for the modules whose weights are quantized again.
        kinds: kind of each layer, as ``Recipe.scheme`` wants it.
        tied_embeddings: the LM head shares the embedding's weights and is never int4.

    Returns:
        None for a checkpoint that no other tool quantized.

    Raises:
        FormatError: it is quantized in a way that cannot be read.
        RecipeError: it must be converted first.
    """
    settings = with_side_configs(config, read_json)
    found = detect(settings, tensors)
    if found is None:
        return None
    if any(stored.name is not None for stored in found.modules.values()):
        raise RecipeError(
            f"{METHOD}: the int4 weights lie in {WEIGHTS_FILE}, beside the BF16 weights that they "
            "replace, and vLLM would read the latter; run 'nanoquant convert' and serve the result"
        )
    written = settings.get("quantization_config")
    may_be_ordered = not isinstance(written, Mapping) or bool(written.get("desc_act", True))
    int4 = {
        name: Int4Module(
            name, None, may_be_ordered and bool(found.modules[name].suffixes & _GROUP_INDICES)
        )
        for name in found.integer_modules
    }
    schemes = {
        name: Scheme(group_size, _TAKEN_OVER) for name, group_size in found.integer_modules.items()
    }
    recipe = options
    if "preset" not in options.model_fields_set:
        recipe = options.model_copy(update={"preset": "full"})
    for name in found.requantized_modules:
        tied = tied_embeddings and role_of(name) is Role.LM_HEAD
        scheme = None if tied else recipe.scheme(name, kinds)
        if scheme is not None:
            schemes[name] = scheme
    return ForeignWeights(found, schemes, int4)
