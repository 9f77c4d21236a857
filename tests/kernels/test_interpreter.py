# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "cases", ["interpreted_cases.py", "interpreted_moe_cases.py", "interpreted_search_cases.py"]
)
def test_kernels_in_the_interpreter(cases: str) -> None:
    """Runs a file of cases; a crash there is an access outside a tensor."""
    path = str(Path(__file__).with_name(cases))
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "pytest", "-qx", "--noconftest", path],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"
