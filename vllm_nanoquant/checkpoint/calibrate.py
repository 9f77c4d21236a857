# SPDX-License-Identifier: Apache-2.0
"""GPTQ's results between calibration, which goes layer by layer, and writing, which goes by file.

Each finished weight waits in a file of its own in a hidden folder of the target, so that
calibration too is taken up where it was interrupted. The folder takes as much disk as the int4
weights, and is deleted when the result is complete.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.report import file_entry
from vllm_nanoquant.files import durable
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.recipe import Recipe

_FOLDER = ".nanoquant_calibrated"


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


class CalibratedWeights:
    """The weights of one target that GPTQ makes, on disk; calibrated when the first is missing."""

    def __init__(
        self,
        target: Path,
        source: Checkpoint,
        recipe: Recipe,
        calibration: Calibration,
        device: torch.device,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            target: where the folder of results is.
            source: the stock checkpoint.
            recipe: which modules.
            calibration: the text.
            device: where layers are run and quantized.
        """
        self._folder = target / _FOLDER
        self._source = source
        self._recipe = recipe
        self._calibration = calibration
        self._device = device
        self._is_complete = False

    def get(self, module: str) -> QuantizedWeight | None:
        """The weight of a module; None for one that calibration does not reach.

        Raises:
            UsageError: the text, the tokenizer or the model does not do.
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
        tensors = load_file(path)
        group_size, in_features = tensors.pop("sizes").tolist()
        return QuantizedWeight(**tensors, group_size=group_size, in_features=in_features)

    def _calibrate(self) -> None:
        # Not at the top: transformers is needed for nothing else, and slow to import.
        from vllm_nanoquant.calibration.stream import CalibrationSettings, quantize_with_text
        from vllm_nanoquant.calibration.text import CalibrationError, load_sequences, load_tokenizer

        self._folder.mkdir(exist_ok=True)
        source = self._source
        text = self._calibration
        try:
            tokenizer = load_tokenizer(source.folder)
            sequences = load_sequences(text.text, tokenizer, text.samples, text.length)
            settings = CalibrationSettings(device=self._device)
            load: Callable[[str], torch.Tensor] = source.load
            for module, weight in quantize_with_text(
                source.folder, load, sequences, self._recipe, settings, self._read
            ):
                self._write(module, weight)
        except CalibrationError as error:
            raise UsageError(f"calibration: {error}") from error

    def _write(self, module: str, weight: QuantizedWeight) -> None:
        tensors = {
            "packed": weight.packed.cpu(),
            "scale": weight.scale.cpu(),
            "zero_point": weight.zero_point.cpu(),
            "sizes": torch.tensor([weight.group_size, weight.in_features]),
        }
        with durable(self._path(module)) as temporary:
            save_file(tensors, temporary)
