# SPDX-License-Identifier: Apache-2.0
"""A transformers model whose layers get their weights one at a time.

The model is built on the meta device: its code and shapes are there, its memory is not. Its
architecture is one that transformers knows; code from a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_nanoquant.calibration.text import CalibrationError

TensorSource = Callable[[str], torch.Tensor]
"""Gives a checkpoint's tensor by name; raises KeyError for a name that the checkpoint lacks."""

# How names of a decoder's tensors begin in checkpoints; transformers has its own beginning.
_PREFIXES = (
    "model.",
    "backbone.",
    "transformer.",
    "model.language_model.",
    "language_model.model.",
    "",
)

Kwargs = dict[str, Any]

_ANY_STEP = (0.0, float("inf"))


class Skeleton:
    """A causal language model without the weights of its layers.

    Attributes:
        config: the transformers config.
        model: the model; embedding and final norm are on `device`, layers are on meta.
        layers: the decoder layers, in order.
        lm_head: the LM head, or None where it is tied to the embedding.
        device: where layers are computed.
    """

    def __init__(
        self, folder: Path, source: TensorSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Build the model of `folder`/config.json and load what is outside of its layers.

        Args:
            folder: a folder with config.json.
            source: the checkpoint's tensors.
            device: where to compute.
            dtype: of the weights and hidden states, as the model is served.

        Raises:
            CalibrationError: transformers does not know the model, its layers are not found, or a
                tensor is missing or has another shape.
        """
        self.device = device
        self._source = source
        self.config, self.model = _build(folder, dtype)
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise CalibrationError(
                f"{folder}: {type(decoder).__name__} has no list of 'layers'; calibration can do "
                "decoders that have one; use algorithm 'mse'"
            )
        self.layers = layers
        self._decoder = decoder
        head = self.model.get_output_embeddings()
        self.lm_head = None if self.config.get_text_config().tie_word_embeddings else head
        self._paths = {id(module): path for path, module in self.model.named_modules()}
        self._decoder_path = self._paths[id(decoder)] + "."
        self._prefix = self._prefix_in_checkpoint(folder)
        for module in decoder.children():
            if module is not layers:
                self.load(module)
        self.model.eval().requires_grad_(False)

    def name_of(self, module: nn.Module) -> str:
        """The checkpoint's name of a module."""
        return self._name(self._paths[id(module)])

    def load(self, module: nn.Module) -> None:
        """Give a module memory on the device, and fill it from the checkpoint.

        Raises CalibrationError naming a tensor that is missing or does not fit.
        """
        path = self._paths[id(module)]
        computed = _computed_buffers(module, self.config)
        module.to_empty(device=self.device)
        for name, buffer in computed.items():
            module.get_buffer(name).copy_(buffer)
        for name, tensor in module.state_dict(keep_vars=True).items():
            self._fill(f"{path}.{name}", tensor)

    def free(self, module: nn.Module) -> None:
        """Give a module's memory back."""
        module.to_empty(device="meta")

    @torch.no_grad()
    def inputs(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[Kwargs]]:
        """Hidden states before the first layer, and what each layer gets besides.

        Args:
            batch: token ids, int64 [sequences, tokens].

        Returns:
            Hidden states [sequences, tokens, hidden]; keyword arguments for each layer.
        """
        seen: list[tuple[torch.Tensor, Kwargs]] = []

        def record(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.append((hidden, kwargs))
            return hidden

        with _replaced_forwards(self.layers, record):
            self._decoder(input_ids=batch.to(self.device), use_cache=False)
        return seen[0][0], [kwargs for _, kwargs in seen]

    @torch.no_grad()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Inputs of the LM head, for hidden states after the last layer."""
        with _replaced_forwards(self.layers, lambda hidden, **_: hidden):
            return self._decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def _prefix_in_checkpoint(self, folder: Path) -> str:
        """What the names of the decoder's tensors begin with in the checkpoint."""
        embedding = self._paths[id(self.model.get_input_embeddings())]
        rest = embedding.removeprefix(self._decoder_path) + ".weight"
        for prefix in (self._decoder_path, *_PREFIXES):
            try:
                self._source(prefix + rest)
            except KeyError:
                continue
            return prefix
        raise CalibrationError(
            f"{folder} has no embedding: none of {', '.join(prefix + rest for prefix in _PREFIXES)}"
        )

    def _name(self, path: str) -> str:
        if not path.startswith(self._decoder_path):
            return path
        return self._prefix + path.removeprefix(self._decoder_path)

    def _fill(self, path: str, target: torch.Tensor) -> None:
        """Fill one parameter or buffer; a stack of experts from the experts' own tensors."""
        name = self._name(path)
        try:
            tensor = self._source(name)
        except KeyError:
            if target.dim() == 3 and ".experts." in path:
                parent, leaf = path.rsplit(".", 1)
                for expert, part in enumerate(target.unbind()):
                    self._fill(f"{parent}.{expert}.{leaf}.weight", part)
                return
            raise CalibrationError(
                f"the checkpoint has no tensor {name}, which transformers' "
                f"{type(self.model).__name__} needs; use algorithm 'mse'"
            ) from None
        if tensor.shape != target.shape:
            raise CalibrationError(
                f"{name} has shape {list(tensor.shape)}; config.json asks for {list(target.shape)}"
            )
        target.data.copy_(tensor)


def _build(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CalibrationError(
            f"transformers cannot build the model of {folder}/config.json by itself ({reason}); "
            "calibration runs no code from a checkpoint; use algorithm 'mse'"
        ) from error
    lift_step_limits(model)
    return config, model


def lift_step_limits(model: nn.Module) -> None:
    """Let Mamba-2 mixers of transformers take steps of any size, as vLLM does.

    transformers 5 raises each step dt of Nemotron-H and Zamba2 to at least `time_step_min`, which
    is meant for the initial weights: another model than the one that was trained and is served.
    """
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = _ANY_STEP


def _computed_buffers(module: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """Buffers that no checkpoint has, computed again by a second module of the same class."""
    buffers = {}
    for path, part in module.named_modules():
        names = part._non_persistent_buffers_set
        if names:
            fresh = type(part)(config)  # rotary embeddings: all of them take the config alone
            for name in names:
                buffers[f"{path}.{name}" if path else name] = fresh.get_buffer(name)
    return buffers


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Layers that compute `forward` instead of themselves, and keep all else that they are."""
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer in layers:
            del layer.forward
