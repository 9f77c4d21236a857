# SPDX-License-Identifier: Apache-2.0
"""What there is to know of a model before a weight is read: config.json and tensors' headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint import source as checkpoint_source
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, printable
from vllm_nanoquant.checkpoint.header import DTYPE_BITS
from vllm_nanoquant.checkpoint.naming import CONFIG, INDEX, SINGLE_SHARD
from vllm_nanoquant.checkpoint.reader import list_shards, read_shard
from vllm_nanoquant.checkpoint.untrusted import MAX_CONFIG, check_inside, read_object
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.shapes import shapes_by_config
from vllm_nanoquant.recipe import METHOD
from vllm_nanoquant.roles import LayerKind

HEADERS = "safetensors headers"

_MAX_ELEMENTS = 1 << 50


@dataclass(frozen=True)
class Facts:
    """A model by its config.json and the names, dtypes and shapes of its tensors.

    Attributes:
        name: as the user gave it.
        config: config.json, or the part of it that describes the text model.
        whole_config: config.json.
        tensors: ``{"dtype": ..., "shape": [...]}`` by name.
        shapes_from: where the shapes come from: HEADERS, or "config.json".
    """

    name: str
    config: Mapping[str, Any]
    whole_config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    shapes_from: str

    @property
    def kinds(self) -> Sequence[LayerKind] | None:
        """Kind of each layer, or None where config.json does not say."""
        return checkpoint_source.kinds_of(dict(self.whole_config))

    @property
    def is_int4(self) -> bool:
        """Whether it is an int4 checkpoint of ours."""
        options = self.whole_config.get("quantization_config")
        return (
            isinstance(options, Mapping)
            and options.get("quant_method") == METHOD
            and "format_version" in options
        )

    @property
    def keeps_lm_head(self) -> bool:
        """Whether the LM head stays as it is, whatever the recipe says."""
        return checkpoint_source.keeps_lm_head(dict(self.whole_config))


def read_facts(model: str | Path, revision: str | None = None) -> Facts:
    """Read what there is of a folder, or of a model of the Hugging Face Hub.

    Of a model of the Hub only config.json, the index and the headers are fetched.

    Raises:
        UsageError: neither a folder nor a model that can be had.
        CheckpointError: config.json or a header is damaged.
    """
    name = str(model)
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision {printable(revision)} is for models of the Hub")
        config = _config_in(folder)
        return _facts(name, config, headers_in(folder))
    # Not at the top: it is not needed for folders.
    from vllm_nanoquant.planner.hub import read_from_hub

    config, tensors = read_from_hub(name, revision)
    return _facts(name, config, tensors)


def _config_in(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UsageError(f"{printable(str(folder))} has no {CONFIG}")
    check_inside(path)
    return read_object(path, MAX_CONFIG)


def headers_in(folder: Path) -> dict[str, Any]:
    """Dtype and shape of each tensor; empty for a folder without safetensors files."""
    if not any((folder / name).exists() for name in (INDEX, SINGLE_SHARD)) and not any(
        folder.glob("*.safetensors")
    ):
        return {}
    found: dict[str, Any] = {}
    for shard in list_shards(folder).names:
        for entry in read_shard(folder, shard).tensors.values():
            found[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape)}
    return found


def _facts(name: str, config: dict[str, Any], tensors: Mapping[str, Any]) -> Facts:
    text = checkpoint_source.text_config(config)
    if tensors:
        return Facts(name, text, config, tensors, HEADERS)
    if config.get("quantization_config", text.get("quantization_config")) is not None:
        raise PlanError(
            f"{printable(name)}: its weights are quantized, and without the safetensors headers it "
            "cannot be told how; give a folder or a model that has them"
        )
    shapes = shapes_by_config(text)
    tensors = {key: {"dtype": "BF16", "shape": list(shape)} for key, shape in shapes.items()}
    check_tensors(tensors)
    return Facts(name, text, config, tensors, CONFIG)


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse shapes and dtypes that no tensor has; for those that no file's size vouches for.

    Raises:
        CheckpointError: one of them.
    """
    for name, entry in tensors.items():
        count = 1
        for size in entry["shape"]:
            if type(size) is not int or size < 0:
                raise CheckpointError(f"{printable(name)}: the shape holds what is not a size")
            count *= size
        if count > _MAX_ELEMENTS or entry["dtype"] not in DTYPE_BITS:
            raise CheckpointError(
                f"{printable(name)}: {printable(str(entry['dtype']))} "
                f"{printable(str(entry['shape']))} is no tensor of a model"
            )
