# SPDX-License-Identifier: Apache-2.0
"""GPTQ of a whole model, one layer at a time.

Each layer is loaded, run on the hidden states of all calibration sequences while X^T X of every
linear's inputs is summed, quantized, and run again with the quantized weights, so that the layers
after it see the inputs that they will get when the model is served. Then it is freed. One layer's
weights and Hessians are in memory at a time, and the hidden states of all sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from vllm_nanoquant.calibration.skeleton import Kwargs, Skeleton, TensorSource
from vllm_nanoquant.calibration.text import CalibrationError
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.gptq import BLOCK, DAMPING, quantize_gptq
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import Recipe
from vllm_nanoquant.roles import layer_kinds

logger = logging.getLogger(__name__)

BATCH_TOKENS = 8192
"""Tokens that pass through a layer together; more save little."""

Finished = Callable[[str], QuantizedWeight | None]


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate; the weights' group sizes are the recipe's.

    Attributes:
        device: where layers are run and quantized.
        dtype: of weights and hidden states while layers are run.
        damping: see `quantize_gptq`.
        block: see `quantize_gptq`.
        batch_tokens: tokens that pass through a layer together, at least one sequence.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    damping: float = DAMPING
    block: int = BLOCK
    batch_tokens: int = BATCH_TOKENS


class _Target(NamedTuple):
    """A linear to be quantized: its name in the checkpoint and its group size."""

    module: nn.Linear
    name: str
    group_size: int


def quantize_with_text(
    folder: Path,
    source: TensorSource,
    sequences: Sequence[torch.Tensor],
    recipe: Recipe,
    settings: CalibrationSettings | None = None,
    finished: Finished = lambda _: None,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantize every linear that a recipe covers with GPTQ, in the order of the layers.

    Routed experts, which transformers keeps in one tensor, are not calibrated and not yielded; a
    log line says so. A tied LM head is left alone.

    Args:
        folder: a folder with the model's config.json; nothing else in it is read.
        source: the checkpoint's tensors by name; KeyError for a name that it lacks. Each layer's
            are asked for when its turn comes.
        sequences: calibration text as token ids, int64 [tokens] each.
        recipe: which modules, by their names in the checkpoint, and their group sizes.
        settings: device, dtype and GPTQ's settings; None for the defaults.
        finished: for resuming. Given a module's name, what an earlier run made of it, or None. Such
            a module is not yielded again; a layer that is finished is only run, once.

    Yields:
        The module's name in the checkpoint, and its quantized weight, on the settings' device.

    Raises:
        CalibrationError: a model that transformers does not know, tensors that are missing or do
            not fit, token ids beyond the vocabulary, fewer tokens than the widest linear has
            inputs, or a layer whose inputs are not finite.
        RecipeError: preset ``quality`` on a model whose layer kinds are unknown.
    """
    settings = settings or CalibrationSettings()
    skeleton = Skeleton(folder, source, torch.device(settings.device), settings.dtype)
    layers = _targets_of_layers(skeleton, recipe)
    head = _targets_of_head(skeleton, recipe)
    _check_text(sequences, [*(target for layer in layers for target in layer), *head], skeleton)
    states = _States(skeleton, sequences, settings)
    progress = tqdm(layers, desc="calibrating", unit="layer", disable=None)
    for index, targets in enumerate(progress):
        layer = skeleton.layers[index]
        skeleton.load(layer)
        yield from _quantize_layer(targets, partial(states.run, index), settings, finished)
        states.run(index, keep=True)
        skeleton.free(layer)
    for target in head:
        skeleton.load(target.module)
        run = partial(states.run_head, target.module)
        yield from _quantize_layer([target], run, settings, finished)
        skeleton.free(target.module)


class _States:
    """The hidden states of all sequences, in batches on the CPU."""

    def __init__(
        self, skeleton: Skeleton, sequences: Sequence[torch.Tensor], settings: CalibrationSettings
    ) -> None:
        self._skeleton = skeleton
        self._hidden: list[torch.Tensor] = []
        # Masks and positions depend on a batch's shape alone.
        self._kwargs: dict[torch.Size, list[Kwargs]] = {}
        for batch in _batches(sequences, settings.batch_tokens):
            hidden, kwargs = skeleton.inputs(batch)
            self._hidden.append(hidden.cpu())
            self._kwargs.setdefault(hidden.shape, kwargs)

    @torch.no_grad()
    def run(self, index: int, keep: bool = False) -> None:
        """Run a layer on every batch; its outputs replace the states if `keep`."""
        layer = self._skeleton.layers[index]
        for i, hidden in enumerate(self._hidden):
            kwargs = self._kwargs[hidden.shape][index]
            output = layer(hidden.to(self._skeleton.device), **kwargs)
            if keep:
                self._hidden[i] = (output[0] if isinstance(output, tuple) else output).cpu()

    @torch.no_grad()
    def run_head(self, head: nn.Module) -> None:
        """Run the final norm and the LM head on every batch."""
        for hidden in self._hidden:
            head(self._skeleton.final_norm(hidden.to(self._skeleton.device)))


def _quantize_layer(
    targets: list[_Target],
    run: Callable[[], None],
    settings: CalibrationSettings,
    finished: Finished,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantize linears that `run` runs; each then computes with its quantized weight."""
    done = {target.name: finished(target.name) for target in targets}
    missing = [target for target in targets if done[target.name] is None]
    if missing:
        hessians = _hessians(missing, run)
    for target in targets:
        quantized = done[target.name]
        if quantized is None:
            quantized = _quantize(target, hessians.pop(target.name), settings)
            yield target.name, quantized
        weight = target.module.weight
        weight.data.copy_(dequantize(quantized).to(weight.dtype))


def _hessians(targets: list[_Target], run: Callable[[], None]) -> dict[str, torch.Tensor | None]:
    """X^T X, fp32 [K, K], of each linear's inputs during `run`; None for one that had none."""
    sums: dict[str, torch.Tensor | None] = {target.name: None for target in targets}

    def add_inputs(name: str, inputs: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        known = sums[name]
        sums[name] = x.t() @ x if known is None else known.addmm_(x.t(), x)

    hooks = [
        target.module.register_forward_pre_hook(
            lambda _, inputs, name=target.name: add_inputs(name, inputs[0])
        )
        for target in targets
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _quantize(
    target: _Target, hessian: torch.Tensor | None, settings: CalibrationSettings
) -> QuantizedWeight:
    weight = target.module.weight.data
    if hessian is None:
        logger.warning("%s was never called in calibration: it is quantized with mse", target.name)
        return quantize_mse(weight, target.group_size)
    try:
        return quantize_gptq(
            weight, hessian, target.group_size, damping=settings.damping, block=settings.block
        )
    except ValueError as error:
        raise CalibrationError(f"{target.name}: {error}") from error


def _targets_of_layers(skeleton: Skeleton, recipe: Recipe) -> list[list[_Target]]:
    kinds = layer_kinds(skeleton.config)
    targets: list[list[_Target]] = []
    experts = 0
    for layer in skeleton.layers:
        targets.append([])
        for path, module in layer.named_modules():
            experts += path.endswith(".experts")
            if isinstance(module, nn.Linear):
                name = skeleton.name_of(module)
                scheme = recipe.scheme(name, kinds)
                if scheme is not None:
                    targets[-1].append(_Target(module, name, scheme.group_size))
    if experts:
        logger.warning(
            "the routed experts of %d layers are not calibrated; where they become int4, it is "
            "with mse",
            experts,
        )
    return targets


def _targets_of_head(skeleton: Skeleton, recipe: Recipe) -> list[_Target]:
    head = skeleton.lm_head
    if not isinstance(head, nn.Linear):
        return []
    name = skeleton.name_of(head)
    scheme = recipe.scheme(name, layer_kinds(skeleton.config))
    return [_Target(head, name, scheme.group_size)] if scheme else []


def _check_text(
    sequences: Sequence[torch.Tensor], targets: list[_Target], skeleton: Skeleton
) -> None:
    """Raise CalibrationError for too little text, or text of another tokenizer."""
    tokens = sum(len(ids) for ids in sequences)
    widest = max(targets, key=lambda target: target.module.in_features, default=None)
    if widest is not None and tokens < widest.module.in_features:
        raise CalibrationError(
            f"the calibration text has {tokens} tokens in {len(sequences)} sequences; "
            f"{widest.name} has {widest.module.in_features} inputs and needs at least as many "
            "tokens (some hundred thousand are usual): give more text, more samples or longer ones"
        )
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings
    for ids in sequences:
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise CalibrationError(
                f"the calibration text has token {int(ids.max())}, and the model knows "
                f"{vocabulary}: the tokenizer is not this model's"
            )


def _batches(sequences: Sequence[torch.Tensor], tokens: int) -> Iterator[torch.Tensor]:
    """Neighbouring sequences of one length, together while they have at most `tokens` tokens."""
    batch: list[torch.Tensor] = []
    for ids in sequences:
        if batch and (len(ids) != len(batch[0]) or (len(batch) + 1) * len(ids) > tokens):
            yield torch.stack(batch)
            batch = []
        batch.append(ids)
    if batch:
        yield torch.stack(batch)
