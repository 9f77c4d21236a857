# SPDX-License-Identifier: Apache-2.0
"""Collecting the facts that checks judge. Nothing large is imported in this process."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from packaging.requirements import Requirement

from vllm_nanoquant.doctor.asking import COMMAND_SECONDS, ask_command, ask_probes
from vllm_nanoquant.doctor.finding import PLUGIN, Answer, Facts
from vllm_nanoquant.doctor.probes import FOLDER

T = TypeVar("T")
_MODULES = ("torch", "triton", "torchvision", "torchaudio", "transformers", "vllm")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")


def gather() -> Facts:
    """Look at this machine, this environment and this shell; takes as long as importing vLLM."""
    no_names: tuple[str, ...] = ()
    providers = _or(no_names, _providers)
    modules = frozenset(name for name in _MODULES if _is_there(name))
    return Facts(
        python=platform.python_version(),
        requires_python=_or(None, _requires_python),
        versions=_versions((PLUGIN, "vllm", *_MODULES, *providers)),
        providers=providers,
        pins=_or({}, lambda: _pins(providers)),
        modules=modules,
        entry_points=_or(no_names, _entry_points),
        environ=dict(os.environ),
        vllm_command=_or(None, _foreign_command),
        compilers=_or(frozenset(), lambda: _compilers(os.environ)),
        answers=_or({}, lambda: _answers([name for name in _MODULES if name in modules])),
        folders=_or({}, lambda: _folders(cache_folders(os.environ))),
    )


def _or(default: T, look: Callable[[], T]) -> T:
    """What `look` returns, or `default`: a broken installation has broken metadata, too."""
    try:
        return look()
    except Exception:
        return default


def _providers() -> tuple[str, ...]:
    """Distributions that bring a module ``vllm``; what pip left half removed has no name."""
    return tuple(sorted({name for name in metadata.packages_distributions()["vllm"] if name}))


def _entry_points() -> tuple[str, ...]:
    entries = metadata.entry_points(group="vllm.general_plugins", name="nanoquant")
    return tuple(entry.value for entry in entries)


def cache_folders(environ: Mapping[str, str]) -> dict[str, str]:
    """Folders of Triton's, vLLM's and the Hub's caches, as each of them decides."""
    home = environ.get("HOME") or "~"
    shared = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    triton_home = environ.get("TRITON_HOME") or home
    hub_home = environ.get("HF_HOME") or f"{shared}/huggingface"
    folders = {
        "triton cache": environ.get("TRITON_CACHE_DIR") or f"{triton_home}/.triton/cache",
        "vllm cache": (environ.get("VLLM_CACHE_ROOT") or f"{shared}/vllm") + "/torch_compile_cache",
        "hugging face cache": environ.get("HF_HUB_CACHE") or f"{hub_home}/hub",
    }
    return {name: _expand(folder) for name, folder in folders.items()}


def _expand(folder: str) -> str:
    """The path with its ``~`` replaced, as it is where a user has no home."""
    return _or(folder, lambda: str(Path(folder).expanduser()))


def _answers(modules: list[str]) -> dict[str, Answer]:
    probes = [*modules, "driver"]
    if "vllm" in modules:
        probes.append("plugin")
    answers = ask_probes(probes)
    # Without a driver its library is not there, which is no error of a probe.
    if shutil.which(_NVIDIA_SMI[0]):
        answers["nvidia-smi"] = ask_command(_NVIDIA_SMI)
    return answers


def _folders(folders: Mapping[str, str]) -> dict[str, Answer]:
    answers = ask_probes([f"{FOLDER}{folder}" for folder in folders.values()], COMMAND_SECONDS)
    return {name: answers[f"{FOLDER}{folder}"] for name, folder in folders.items()}


def _is_there(module: str) -> bool:
    """Whether a module can be found; a broken finder or parent counts as found."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return True


def _requires_python() -> str | None:
    return metadata.metadata(PLUGIN)["Requires-Python"]


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {name: _version(name) for name in names}
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str | None:
    return _or(None, lambda: metadata.version(name))


def _pins(providers: tuple[str, ...]) -> dict[str, str]:
    """Which torch vLLM asks for, and which Triton torch asks for, where either says so."""
    of_torch = [wanted for name in providers if (wanted := _wanted(name, "torch"))]
    of_triton = _wanted("torch", "triton")
    pins = {"torch": of_torch[0] if of_torch else "", "triton": of_triton}
    return {package: wanted for package, wanted in pins.items() if wanted}


def _wanted(distribution: str, package: str) -> str:
    """Versions of a package that a distribution asks for here; empty where any will do."""
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == package and applies:
            return str(requirement.specifier)
    return ""


def _foreign_command() -> str | None:
    """The shell's ``vllm``, if this Python's environment is not where it lies."""
    command = shutil.which("vllm")
    if command is None:
        return None
    ours = {Path(sys.executable).parent.resolve(), Path(sysconfig.get_path("scripts")).resolve()}
    # It may be a link to an environment's command, or lie in a folder that is a link.
    theirs = {Path(command).parent.resolve(), Path(command).resolve().parent}
    return None if ours & theirs else command


def _compilers(environ: Mapping[str, str]) -> frozenset[str]:
    found = set()
    for language, variable, names in (
        ("c", "CC", ("gcc", "clang")),
        ("c++", "CXX", ("g++", "clang++")),
    ):
        # A compiler named with options, as CC="gcc -m64".
        given = (environ.get(variable) or "").split()[:1]
        if any(shutil.which(name) for name in given or names):
            found.add(language)
    if (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        found.add("Python.h")
    return frozenset(found)
