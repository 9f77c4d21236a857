# SPDX-License-Identifier: Apache-2.0
"""The snippets of docs/python_api.md."""

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "python_api.md").read_text(encoding="utf-8")


def snippets(part):
    return re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)


def test_what_needs_no_engine_runs_from_top_to_bottom():
    names = {}
    outside = snippets(PAGE.split("## Outside vLLM")[1])
    assert len(outside) == 3
    for code in outside:
        exec(compile(code, "python_api.md", "exec"), names)
    assert names["y"].shape == (3, 5, 672)
    assert names["int4"].nbytes < names["weight"].nbytes / 2


def test_what_starts_an_engine_is_python_and_names_what_exists():
    from vllm_nanoquant.serving.patch import PatchWorker

    (code,) = snippets(PAGE.split("## Outside vLLM")[0])
    compile(code, "python_api.md", "exec")
    assert f'"{PatchWorker.__module__}.{PatchWorker.__qualname__}"' in code
    assert f'"{PatchWorker.nanoquant_patch.__name__}"' in PAGE
