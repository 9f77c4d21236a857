# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest

from tests.test_doctor import GOOD, but, without
from vllm_nanoquant import doctor

WARNING = but(vllm_command="/opt/bin/vllm")


@pytest.fixture
def surroundings(monkeypatch):
    return lambda facts: monkeypatch.setattr(doctor, "gather", lambda: facts)


@pytest.mark.parametrize(
    ("facts", "status", "summary"),
    [
        (GOOD, 0, {"pass": 14, "warn": 0, "fail": 0}),
        (WARNING, 0, {"pass": 13, "warn": 1, "fail": 0}),
        (but(environ={"VLLM_PLUGINS": "x"}), 1, {"pass": 13, "warn": 0, "fail": 1}),
        (without("vllm"), 1, {"pass": 12, "warn": 1, "fail": 1}),
    ],
    ids=["good", "warning", "failure", "no vllm"],
)
def test_exit_status_and_json(run, surroundings, facts, status, summary):
    surroundings(facts)
    given, out, err = run("doctor", "--json")
    result = json.loads(out)
    assert (given, err) == (status, "")
    assert result["summary"] == summary
    for finding in result["findings"]:
        assert list(finding) == ["name", "status", "found", "way_out"]
        assert all(isinstance(value, str) for value in finding.values())
        assert bool(finding["way_out"]) == (finding["status"] != "pass")
    lines = run("doctor")[1].splitlines()
    assert len(lines) == len(result["findings"]) + 1
    for finding, line in zip(result["findings"], lines, strict=False):
        assert line.startswith(f"{finding['status']}  {finding['name']} {finding['found']}")
        assert line.endswith(finding["way_out"])
    assert lines[-1] == "passed: {pass}, warnings: {warn}, failed: {fail}".format(**summary)


def test_help_names_the_exit_status(run):
    status, out, _ = run("doctor", "--help")
    assert status == 0
    assert "examples:\n  nanoquant doctor\n" in out
    assert "exit status: 0" in out


@pytest.mark.slow
def test_this_very_environment():
    """Nothing fails where the tests run; whatever imports do, only JSON is on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_nanoquant", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    findings = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, [each for each in findings.values() if each["status"] == "fail"]
    assert findings["entry point"]["found"] == "vLLM knows nanoquant_w4a16"
    assert findings["python"]["found"] == ".".join(map(str, sys.version_info[:3]))


def test_asking_imports_nothing_large_here():
    code = (
        "import sys; from vllm_nanoquant import doctor; doctor.judge;"
        "large = 'torch', 'vllm', 'triton', 'transformers', 'numpy', 'pydantic';"
        "print([name for name in large if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
