# SPDX-License-Identifier: Apache-2.0
"""What the plugin does to a process: nothing, until our method is used."""

import importlib.metadata
import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "triton", "numpy", "pydantic", "transformers")


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_pulls_in_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import vllm_nanoquant; "
        "new = set(sys.modules) - before; "
        f"print(sorted(m for m in new if m.split('.')[0] in {HEAVY}), len(new))"
    )
    found, count = python(code).rsplit(" ", 1)
    assert found == "[]"
    assert int(count) < 10


def test_the_entry_point_is_declared():
    (entry,) = [
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "nanoquant"
    ]
    assert entry.value == "vllm_nanoquant.plugin:register"


@pytest.mark.compat
def test_register_is_idempotent_and_starts_no_gpu_and_no_triton_work():
    code = """
import sys
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
original = VllmConfig._set_cudagraph_sizes
before = set(sys.modules)
from vllm_nanoquant import register
register(); register()
new = {name for name in set(sys.modules) - before if not name.startswith("vllm_nanoquant")}
import torch
from vllm_nanoquant import NanoquantConfig
print(
    QUANTIZATION_METHODS.count("nanoquant_w4a16"),
    get_quantization_config("nanoquant_w4a16") is NanoquantConfig,
    VllmConfig._set_cudagraph_sizes is original,
    torch.cuda.is_initialized(),
    any(name.split(".")[0] == "triton" for name in new),
    "vllm_nanoquant.layers.linear" in sys.modules,
    "vllm_nanoquant.kernels.ops" in sys.modules,
)
"""
    assert python(code) == "1 True True False False False False"


@pytest.mark.compat
def test_parsers_are_offered_and_not_imported_and_take_no_ones_name():
    code = """
import sys
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
managers = (ToolParserManager, ReasoningParserManager)
ToolParserManager.register_lazy_module("nanoquant_nemotron_v2", "theirs", "Theirs")
from vllm_nanoquant.plugin import PARSERS, register
register(); register()
theirs = ToolParserManager.lazy_parsers.pop(PARSERS)
register()
late = sum(f"vllm_nanoquant.serving.{name}_parser" in sys.modules for name in ("tool", "reasoning"))
print(
    PARSERS,
    theirs[0],
    [PARSERS in manager.list_registered() for manager in managers],
    late,
    ToolParserManager.get_tool_parser(PARSERS).__name__,
    ReasoningParserManager.get_reasoning_parser(PARSERS).__name__,
)
"""
    assert python(code) == (
        "nanoquant_nemotron_v2 theirs [True, True] 0 NemotronV2ToolParser NemotronV2ReasoningParser"
    )


@pytest.mark.compat
def test_what_cannot_be_registered_ends_no_process_and_leaves_the_rest():
    code = """
import sys
sys.modules["vllm_nanoquant.config"] = None  # importing it now raises
from vllm_nanoquant.plugin import PARSERS, register
register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.tool_parsers import ToolParserManager
found = [PARSERS in ToolParserManager.list_registered(), "nanoquant_w4a16" in QUANTIZATION_METHODS]
del sys.modules["vllm_nanoquant.config"]
sys.modules["vllm.tool_parsers"] = None
register()
print(*found, "nanoquant_w4a16" in QUANTIZATION_METHODS)
"""
    assert python(code) == "True False True"


@pytest.mark.compat
@pytest.mark.parametrize(
    ("version", "accepted"),
    [("0.25.1", False), ("0.26.0", True), ("0.33.2", True), ("0.33.1.dev5+g0", True),
     ("0.34.0", False), ("dev", True)],
)  # fmt: skip
def test_the_supported_range_of_vllm(monkeypatch, version, accepted):
    import vllm

    from vllm_nanoquant import compat

    monkeypatch.setattr(vllm, "__version__", version)
    if accepted:
        compat.require_supported_vllm()
        return
    with pytest.raises(ImportError, match=rf"supports vLLM 0\.26 .* this is {version}"):
        compat.require_supported_vllm()


def test_public_names_are_there_and_others_are_not():
    import vllm_nanoquant

    assert set(vllm_nanoquant.__all__) <= set(dir(vllm_nanoquant)) | set(vllm_nanoquant._HOMES)
    assert vllm_nanoquant.Recipe().preset == "balanced"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vllm_nanoquant.nothing  # noqa: B018
