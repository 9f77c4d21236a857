# SPDX-License-Identifier: Apache-2.0
"""Checks of GPUs, of their driver, and of the folders that caches lie in."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from vllm_nanoquant.doctor.finding import Facts, Finding
from vllm_nanoquant.requirements import MIN_CAPABILITY

VISIBLE = "CUDA_VISIBLE_DEVICES"
CACHES = {"triton cache": 1.0, "vllm cache": 5.0, "hugging face cache": 20.0}
"""Gigabytes that should be free, by the cache's name: compiled kernels, compiled graphs, and a
checkpoint of 9 billion weights in BF16."""

_CAPABILITY = f"SM{MIN_CAPABILITY}"


def check_driver(facts: Facts) -> Finding:
    """The NVIDIA driver: there, answering, and recent enough for torch's CUDA."""
    torch, driver = facts.value("torch"), facts.value("driver")
    smi = facts.answers.get("nvidia-smi")
    if smi and smi.error:
        way_out = "load the driver anew or restart the machine; in a container, update its host"
        return Finding("driver", "fail", f"nvidia-smi: {smi.error}", way_out)
    version = str(facts.value("nvidia-smi").get("lines", [""])[0]).partition(",")[0]
    if not driver:
        if not torch.get("cuda"):
            use = ", and this torch uses none" if torch else ""
            return Finding("driver", "pass", f"{version or 'none'}{use}")
        way_out = "install NVIDIA's driver; in a container, start it with --gpus all"
        return Finding(
            "driver", "warn", f"no NVIDIA driver for torch's CUDA {torch['cuda']}", way_out
        )
    supports = f"{driver['cuda'][0]}.{driver['cuda'][1]}"
    found = f"NVIDIA {version}, CUDA {supports}" if version else f"CUDA {supports}"
    # Of a major release of CUDA, every driver runs what any minor one was built with.
    too_old = torch.get("cuda") and driver["cuda"][0] < int(torch["cuda"].partition(".")[0])
    if too_old and not torch["devices"]:
        way_out = f"install a newer driver, or a vLLM built for CUDA {driver['cuda'][0]}"
        found = f"{found}, but torch is built for CUDA {torch['cuda']}"
        return Finding("driver", "fail", found, way_out)
    return Finding("driver", "pass", found)


def check_gpus(facts: Facts) -> list[Finding]:
    """Each GPU that torch can use, or why there is none."""
    torch = facts.value("torch")
    if not torch:
        return [Finding("gpu", "warn", "not known without torch", "mend torch first")]
    if torch["devices"]:
        capable = any(_capability(device) >= MIN_CAPABILITY for device in torch["devices"])
        return [_judge(i, device, capable) for i, device in enumerate(torch["devices"])]
    return [_no_gpu(facts, torch)]


def _no_gpu(facts: Facts, torch: Mapping[str, Any]) -> Finding:
    listed = [line.partition(",")[2].strip() for line in facts.value("nvidia-smi").get("lines", [])]
    if torch["hip"]:
        found = f"torch is built for ROCm {torch['hip']}, and the kernels are for NVIDIA GPUs"
        return Finding("gpu", "fail", found, "use an NVIDIA GPU, or the CPU build of vLLM")
    if not listed:
        found = "none; the CPU works, but slowly"
        return Finding("gpu", "warn", found, f"for speed, an NVIDIA GPU from {_CAPABILITY} on")
    names = ", ".join(listed)
    if not torch["cuda"]:
        way_out = "install the CUDA build of vLLM: pip install 'vllm-nanoquant[cuda]'"
        return Finding("gpu", "warn", f"{names} not used: torch is built for the CPU", way_out)
    if VISIBLE in facts.environ:
        found = f"{names} not used: {VISIBLE}={facts.environ[VISIBLE]!r}"
        return Finding("gpu", "warn", found, f"unset {VISIBLE}")
    why = torch["why_none"] or "torch finds no device"
    return Finding("gpu", "fail", f"{names} cannot be used: {why}", "mend the driver first")


def _judge(index: int, device: Mapping[str, Any], capable: bool) -> Finding:
    name, capability = f"gpu {index}", _capability(device)
    found = f"{device['name']}, SM{capability}, {device['bytes'] / 2**30:.0f} GiB"
    if capability >= MIN_CAPABILITY:
        kind = "measured settings" if _has_table(device) else "settings by rule"
        return Finding(name, "pass", f"{found}, kernels with {kind}")
    if capable:
        way_out = f"leave it out with {VISIBLE}"
        return Finding(name, "warn", f"{found}, older than {_CAPABILITY}", way_out)
    way_out = f"an NVIDIA GPU from {_CAPABILITY} (Ampere) on, or the CPU build of vLLM"
    return Finding(name, "fail", f"{found}, older than {_CAPABILITY}", way_out)


def _capability(device: Mapping[str, Any]) -> int:
    major, minor = device["capability"]
    return int(major) * 10 + int(minor)


def _has_table(device: Mapping[str, Any]) -> bool:
    """As `kernels.settings`, which imports torch: by capability and number of multiprocessors."""
    tuning = files("vllm_nanoquant") / "kernels" / "tuning"
    path = tuning / f"sm{_capability(device)}.json"
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text())["multiprocessors"] == device["multiprocessors"])


def check_cache(facts: Facts, name: str, folder: str) -> Finding:
    """A cache's folder: there or can be made, writable, with room."""
    answer = facts.folders.get(name)
    setting = {
        "triton cache": "TRITON_CACHE_DIR",
        "vllm cache": "VLLM_CACHE_ROOT",
        "hugging face cache": "HF_HOME",
    }[name]
    elsewhere = f"set {setting} to a folder with room that can be written"
    if answer is None or answer.value is None:
        why = answer.error if answer else "not tried"
        return Finding(name, "warn", f"{folder} cannot be written: {why}", elsewhere)
    free, wanted = answer.value["free"] / 1e9, CACHES[name]
    if free < wanted:
        found = f"{folder} has {free:.1f} GB free, and {wanted:.0f} GB are soon used"
        return Finding(name, "warn", found, f"make room there, or {elsewhere}")
    made = "" if answer.value["exists"] else ", not made yet"
    return Finding(name, "pass", f"{folder}, {free:.0f} GB free{made}")
