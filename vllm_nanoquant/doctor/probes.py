# SPDX-License-Identifier: Apache-2.0
"""Probes that may crash or hang: a script for a process of its own, which `asking` starts.

``python -P probes.py RESULTS PROBE...`` adds a line to the file RESULTS when a probe has ended. So
where the process dies, the file shows which probe it died of. It is run by its path, and imports
nothing of this package but through vLLM's entry point.
"""

import ctypes
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

FOLDER = "folder="
"""What a probe's name begins with that looks at the folder named by the rest."""


def _driver() -> dict[str, Any]:
    """The CUDA version that the NVIDIA driver supports, asked of the driver itself."""
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        raise OSError(f"cuDriverGetVersion returned {status}")
    return {"cuda": [version.value // 1000, version.value % 1000 // 10]}


def _torch() -> dict[str, Any]:
    """How torch was built, and the GPUs it can use."""
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [],
        "why_none": "",
    }
    if not found["cuda"]:
        return found
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found["devices"].append(
                {
                    "name": device.name,
                    "capability": [device.major, device.minor],
                    "bytes": device.total_memory,
                    "multiprocessors": device.multi_processor_count,
                }
            )
    except Exception as error:
        found["why_none"] = _one_line(error)
    return found


def _transformers() -> dict[str, Any]:
    """Whether what vLLM takes of transformers can be imported; it is lazy, so by name."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel

    classes = (AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel)
    return {"classes": [each.__name__ for each in classes]}


def _plugin() -> dict[str, Any]:
    """Whether vLLM knows the method after the plugin was loaded as vLLM loads it."""
    (entry,) = entry_points(group="vllm.general_plugins", name="nanoquant")
    entry.load()
    # Not what the entry point names: that only logs what goes wrong.
    config = importlib.import_module("vllm_nanoquant.config")
    config.register_config()
    importlib.import_module("vllm_nanoquant.compat").require_supported_vllm()
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    quantization.get_quantization_config(config.METHOD)
    return {"method": config.METHOD, "file": config.__file__}


def _module(name: str) -> dict[str, Any]:
    return {"version": str(getattr(importlib.import_module(name), "__version__", ""))}


def _folder(name: str) -> dict[str, Any]:
    """Whether a file can be written in a folder, or where the folder would be made; bytes free."""
    place = Path(name)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is not a folder")
    # Gone when it is closed. Rights alone would not show a full or read-only file system.
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"0")
        file.flush()
    return {"exists": place == Path(name), "free": shutil.disk_usage(place).free}


_PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "driver": _driver,
    "torch": _torch,
    "transformers": _transformers,
    "plugin": _plugin,
}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def probe(name: str) -> dict[str, Any]:
    """What a probe finds out, by its name; the name of any other module is imported."""
    if name.startswith(FOLDER):
        return _folder(name.removeprefix(FOLDER))
    return _PROBES[name]() if name in _PROBES else _module(name)


def main(results: str, *names: str) -> None:
    """Run probes and write what they find, line by line."""
    with Path(results).open("a", encoding="utf-8", buffering=1) as file:
        for name in names:
            try:
                line = {"probe": name, "value": probe(name)}
            # A package that calls sys.exit while it is imported is as broken as one that raises.
            except (Exception, SystemExit) as error:
                line = {"probe": name, "error": _one_line(error)}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
