# SPDX-License-Identifier: Apache-2.0
"""What the plugin needs of its surroundings, told without importing torch or vLLM."""

from collections.abc import Mapping

from packaging.version import Version

MIN_VLLM = Version("0.26")
"""First supported release."""
MAX_VLLM = Version("0.34")
"""First release that is not supported."""
MIN_CAPABILITY = 80
"""Compute capability, times ten, of the oldest supported GPU: bf16 tensor cores."""

BYTECODE_HOOK = "VLLM_USE_BYTECODE_HOOK"
"""vLLM's variable for the hook that `nanoquant_w4a16` does not run under."""


def why_not_under(environ: Mapping[str, str]) -> str | None:
    """Why an engine with our method refuses this environment; None where it does not.

    The text goes on after the method's name.
    """
    value = forced_bytecode_hook(environ)
    if value is None:
        return None
    return (
        f"does not run under vLLM's bytecode hook, and {BYTECODE_HOOK}={value} is set: one "
        "compiled graph must serve every batch size. Unset it, or set it to 0"
    )


def forced_bytecode_hook(environ: Mapping[str, str]) -> str | None:
    """The value by which vLLM's bytecode hook is switched on by hand; None if it is not."""
    value = environ.get(BYTECODE_HOOK)
    return None if value is None or value.strip() == "0" else value
