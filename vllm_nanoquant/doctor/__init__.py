# SPDX-License-Identifier: Apache-2.0
"""Whether this machine, this environment and this shell can serve `nanoquant_w4a16`.

`gathering` collects facts, with everything that may crash or hang in other processes; the checks of
`software` and `hardware` judge them. None of them imports torch, Triton or vLLM here.
"""

from collections.abc import Callable

from vllm_nanoquant.doctor.finding import PLUGIN, Facts, Finding
from vllm_nanoquant.doctor.gathering import cache_folders, gather
from vllm_nanoquant.doctor.hardware import check_cache, check_driver, check_gpus
from vllm_nanoquant.doctor.software import (
    check_bytecode_hook,
    check_compiler,
    check_entry_point,
    check_media,
    check_plugin,
    check_python,
    check_torch,
    check_triton,
    check_vllm,
)

__all__ = ["Facts", "Finding", "gather", "judge"]


def judge(facts: Facts) -> list[Finding]:
    """Run every check. One that fails to work is a finding, and the others still run."""
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        (PLUGIN, lambda: check_plugin(facts)),
        ("python", lambda: check_python(facts)),
        ("vllm", lambda: check_vllm(facts)),
        ("torch", lambda: check_torch(facts)),
        ("triton", lambda: check_triton(facts)),
        ("compiler", lambda: check_compiler(facts)),
        ("transformers", lambda: check_media(facts)),
        ("driver", lambda: check_driver(facts)),
        ("gpu", lambda: check_gpus(facts)),
        ("entry point", lambda: check_entry_point(facts)),
        ("compile hook", lambda: check_bytecode_hook(facts)),
        ("caches", lambda: _check_caches(facts)),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            result = check()
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {error}"
            result = Finding(name, "fail", found, "please report it")
        findings += result if isinstance(result, list) else [result]
    return findings


def _check_caches(facts: Facts) -> list[Finding]:
    folders = cache_folders(facts.environ)
    return [check_cache(facts, name, folder) for name, folder in folders.items()]
