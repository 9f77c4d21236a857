# SPDX-License-Identifier: Apache-2.0
"""config.json and the headers of a model of the Hugging Face Hub; no weight is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import UsageError, printable
from vllm_nanoquant.checkpoint.naming import CONFIG
from vllm_nanoquant.checkpoint.source import from_hub
from vllm_nanoquant.checkpoint.untrusted import MAX_CONFIG, read_object


def read_from_hub(name: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a model, and dtype and shape of each tensor by name.

    What is in the Hub's cache is read there. There are no tensors where the model has no
    safetensors files, or where config.json is in the cache and the Hub cannot be reached.

    Raises:
        UsageError: no such model, or the Hub cannot be reached.
    """
    import huggingface_hub

    path = from_hub(name, lambda: huggingface_hub.hf_hub_download(name, CONFIG, revision=revision))
    config = read_object(path, MAX_CONFIG)
    return config, _cached_tensors(path.parent) or _fetched_tensors(name, revision)


def _cached_tensors(snapshot: Path) -> dict[str, Any]:
    """Headers of a snapshot in the cache; empty unless all of its files are there."""
    from vllm_nanoquant.checkpoint.errors import CheckpointError
    from vllm_nanoquant.planner.source import headers_in

    try:
        return headers_in(snapshot)
    except CheckpointError:
        return {}


def _fetched_tensors(name: str, revision: str | None) -> dict[str, Any]:
    """Headers of the Hub's files; empty where it has none, or cannot be reached."""
    import huggingface_hub
    from huggingface_hub.errors import SafetensorsParsingError

    from vllm_nanoquant.planner.source import check_tensors

    try:
        found = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except SafetensorsParsingError as error:
        raise UsageError(f"{printable(name)}: {printable(str(error))}") from None
    # No such files, offline mode, or an error of whichever HTTP library the client is built on.
    except Exception:
        return {}
    tensors = {
        tensor: {"dtype": info.dtype, "shape": list(info.shape)}
        for file in found.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    check_tensors(tensors)
    return tensors
