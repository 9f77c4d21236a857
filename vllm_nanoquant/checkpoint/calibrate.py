# SPDX-License-Identifier: Apache-2.0
"""GPTQ's results between calibration, which goes layer by layer, and writing, which goes by file.

Each finished weight waits in a file of its own in a hidden folder of the target, so that
calibration too is taken up where it was interrupted. The folder takes as much disk as the int4
weights, and is deleted when the result is complete.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.journal import Journal
from vllm_nanoquant.checkpoint.naming import WEIGHT, is_routed_expert
from vllm_nanoquant.checkpoint.plan import Step
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.report import file_entry
from vllm_nanoquant.checkpoint.source import text_config
from vllm_nanoquant.files import durable
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.recipe import Recipe
from vllm_nanoquant.roles import layer_index

_FOLDER = ".nanoquant_calibrated"


_LOOKED_AT = "every weight is finite"


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate with.

    Attributes:
        text: a file, as `calibration.text.load_sequences` takes it.
        samples: most sequences.
        length: most tokens of a sequence.
    """

    text: Path
    samples: int
    length: int

    @property
    def digest(self) -> str:
        """What of it the weights depend on.

        Raises:
            CheckpointError: the file cannot be read.
        """
        return f"{file_entry(self.text)['sha256']} {self.samples} {self.length}"


def read_sequences(
    source: Checkpoint, steps: Iterable[Step], calibration: Calibration
) -> list[torch.Tensor]:
    """Read the text and judge it, before anything is written.

    Args:
        source: the stock checkpoint, whose tokenizer is used.
        steps: what will be written.
        calibration: the text.

    Returns:
        Sequences, int64 [tokens] each.

    Raises:
        UsageError: the text or the tokenizer cannot be read, or there is too little text.
    """
    # Not at the top: transformers is needed for nothing else, and slow to import.
    from vllm_nanoquant.calibration.text import CalibrationError, load_sequences, load_tokenizer

    try:
        tokenizer = load_tokenizer(source.folder)
        sequences = load_sequences(
            calibration.text, tokenizer, calibration.samples, calibration.length
        )
    except CalibrationError as error:
        raise UsageError(f"calibration: {error}") from error
    tokens = sum(map(len, sequences))
    calibrated = (step for step in steps if _is_calibrated(step))
    widest = max(calibrated, key=lambda step: step.source.shape[1], default=None)
    if widest is not None and tokens < widest.source.shape[1]:
        raise UsageError(
            f"calibration: {printable(str(calibration.text))} gives {tokens} tokens in "
            f"{len(sequences)} sequences; {printable(widest.key)} has {widest.source.shape[1]} "
            "inputs and needs at least as many tokens (some hundred thousand are usual): give more "
            "text, more samples or longer ones"
        )
    return sequences


def calibration_bytes(source: Checkpoint, steps: Iterable[Step], tokens: int) -> dict[str, int]:
    """Estimate of the memory that calibration takes beyond torch itself, by what it is for.

    Hidden states are BF16, 2 x tokens x hidden size. In a layer with its weights in BF16, each
    linear has a Hessian, 4 K^2 bytes, and one at a time is quantized, 12 K^2 + 20 N K bytes.
    What a layer needs while it runs is not in it.

    Args:
        source: the stock checkpoint.
        steps: what will be written.
        tokens: of all sequences together.
    """
    linears: dict[int | None, list[tuple[int, ...]]] = defaultdict(list)
    weights: Counter[int | None] = Counter()
    for step in steps:
        # Embedding, final norm and LM head count as one more layer.
        layer = layer_index(step.key)
        weights[layer] += 2 * step.source.numel
        if _is_calibrated(step):
            linears[layer].append(step.source.shape)
    config = text_config(source.config)
    hidden = config.get("hidden_size")
    if type(hidden) is not int:
        hidden = max((columns for shapes in linears.values() for _, columns in shapes), default=0)
    outside = weights.pop(None, 0)
    return {
        "hidden states": 2 * tokens * hidden,
        "outside of the layers": outside,
        "largest layer": max(weights.values(), default=0),
        "Hessians": max((sum(4 * k * k for _, k in s) for s in linears.values()), default=0),
        "quantizing": max(
            (12 * k * k + 20 * n * k for shapes in linears.values() for n, k in shapes), default=0
        ),
    }


def _is_calibrated(step: Step) -> bool:
    """Whether GPTQ makes the result of a step; routed experts get ``mse``."""
    return step.is_int4 and not is_routed_expert(step.source.name.removesuffix(WEIGHT))


class CalibratedWeights:
    """The weights of one target that GPTQ makes, on disk; calibrated when the first is missing."""

    def __init__(
        self,
        target: Path,
        source: Checkpoint,
        recipe: Recipe,
        sequences: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            target: where the folder of results is.
            source: the stock checkpoint.
            recipe: which modules.
            sequences: the text, as `read_sequences` gives it.
            device: where layers are run and quantized.
        """
        self._folder = target / _FOLDER
        self._source = source
        self._recipe = recipe
        self._sequences = sequences
        self._device = device
        self._is_complete = False

    def check_weights(self, steps: Iterable[Step], journal: Journal) -> None:
        """Look at every weight that will be int4 once, before hours go by.

        Raises:
            CheckpointError: one is not finite.
        """
        if journal.get(_LOOKED_AT) is not None:
            return
        for step in steps:
            if not step.is_int4:
                continue
            bad = int((~torch.isfinite(self._source.load(step.key))).sum())
            if bad:
                raise CheckpointError(
                    f"{at(self._source.file_of(step.key), step.key)}: {bad} weights are not finite "
                    "(NaN or infinite); the checkpoint is damaged, fetch its files again"
                )
        journal.add(_LOOKED_AT, {})

    def get(self, module: str) -> QuantizedWeight | None:
        """The weight of a module; None for one that calibration does not reach.

        Raises:
            UsageError: the model cannot be calibrated, or not with this text.
            CheckpointError: a finished weight on disk is damaged.
        """
        found = self._read(module)
        if found is None and not self._is_complete:
            self._calibrate()
            self._is_complete = True
            found = self._read(module)
        return found

    def remove(self) -> None:
        """Delete the folder."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _path(self, module: str) -> Path:
        return self._folder / f"{hashlib.sha256(module.encode()).hexdigest()}.safetensors"

    def _read(self, module: str) -> QuantizedWeight | None:
        path = self._path(module)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            group_size, in_features = tensors.pop("sizes").tolist()
            return QuantizedWeight(**tensors, group_size=group_size, in_features=in_features)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{_FOLDER}/{at(path)}: a calibrated weight is damaged ({printable(str(error))}); "
                "remove this file and run the same command again"
            ) from None

    def _calibrate(self) -> None:
        # Not at the top: transformers is needed for nothing else, and slow to import.
        from vllm_nanoquant.calibration.stream import CalibrationSettings, quantize_with_text
        from vllm_nanoquant.calibration.text import CalibrationError

        self._folder.mkdir(exist_ok=True)
        settings = CalibrationSettings(device=self._device)
        load: Callable[[str], torch.Tensor] = self._source.load
        try:
            for module, weight in quantize_with_text(
                self._source.folder, load, self._sequences, self._recipe, settings, self._read
            ):
                self._write(module, weight)
        except CalibrationError as error:
            raise UsageError(
                f"calibration: {error}. What is finished stays in the target; the same command "
                "goes on from there"
            ) from error

    def _write(self, module: str, weight: QuantizedWeight) -> None:
        tensors = {
            "packed": weight.packed.cpu(),
            "scale": weight.scale.cpu(),
            "zero_point": weight.zero_point.cpu(),
            "sizes": torch.tensor([weight.group_size, weight.in_features]),
        }
        with durable(self._path(module)) as temporary:
            save_file(tensors, temporary)
