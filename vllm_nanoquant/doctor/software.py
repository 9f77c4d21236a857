# SPDX-License-Identifier: Apache-2.0
"""Checks of what is installed, and of the settings that vLLM and this plugin read."""

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_nanoquant import __version__
from vllm_nanoquant.doctor.finding import PLUGIN, Facts, Finding, Status
from vllm_nanoquant.requirements import BYTECODE_HOOK, MAX_VLLM, MIN_VLLM, forced_bytecode_hook

_ENTRY_POINT = "vllm_nanoquant.plugin:register"
_INSTALL_VLLM = f"pip install 'vllm>={MIN_VLLM},<{MAX_VLLM}'"


def check_plugin(facts: Facts) -> Finding:
    """This package: installed, and no other version than the one that runs."""
    installed = facts.versions.get(PLUGIN)
    if installed is None:
        found = f"{__version__}, but not installed in this environment"
        return Finding(PLUGIN, "fail", found, "run its pip install . in a checkout")
    if installed != __version__:
        found = f"{__version__} runs, but {installed} is installed"
        return Finding(PLUGIN, "warn", found, "install it again, and leave PYTHONPATH unset")
    return Finding(PLUGIN, "pass", installed)


def check_python(facts: Facts) -> Finding:
    """The version of Python, by what the installed plugin asks for."""
    wanted = facts.requires_python
    if wanted and not SpecifierSet(wanted).contains(facts.python, prereleases=True):
        way_out = f"make an environment with Python {wanted}"
        return Finding("python", "fail", f"{facts.python}, not supported", way_out)
    return Finding("python", "pass", facts.python)


def check_vllm(facts: Facts) -> Finding:
    """VLLM: installed once, of a supported release, and importable."""
    if "vllm" not in facts.modules:
        return Finding("vllm", "fail", "not installed", _INSTALL_VLLM)
    answer = facts.answers.get("vllm")
    if answer and answer.error:
        way_out = "mend what the message names (torch and transformers below), or install it anew"
        return Finding("vllm", "fail", f"cannot be imported: {answer.error}", way_out)
    names = " and ".join(facts.providers)
    version = facts.value("vllm").get("version") or facts.versions.get(names, "")
    found = f"{version} ({names})" if names else version
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        way_out = f"take a supported release: {_INSTALL_VLLM}"
        return Finding("vllm", "warn", f"{found}, of an unknown release", way_out)
    if not MIN_VLLM <= release < MAX_VLLM:
        way_out = f"{_INSTALL_VLLM}, or a vllm-nanoquant made for yours"
        return Finding("vllm", "fail", f"{found}, not supported", way_out)
    if len(facts.providers) > 1:
        way_out = f"pip uninstall {' '.join(facts.providers)}, and install one of them"
        return Finding("vllm", "warn", f"{found}, installed over each other", way_out)
    if names and "vllm" not in facts.versions:
        found = (
            f"{found}, whose command 'vllm' looks for a distribution named vllm, and may not start"
        )
        way_out = "use python -m vllm.entrypoints.openai.api_server --model MODEL"
        return Finding("vllm", "warn", found, way_out)
    if facts.vllm_command:
        found = f"{found}, but the shell's 'vllm' is {facts.vllm_command}, of another environment"
        return Finding("vllm", "warn", found, "activate the environment of this Python")
    return Finding("vllm", "pass", found)


def check_torch(facts: Facts) -> Finding:
    """Torch: importable, and the one that vLLM was built for."""
    if "torch" not in facts.modules:
        return Finding(
            "torch", "fail", "not installed", f"install vLLM, which brings it: {_INSTALL_VLLM}"
        )
    answer = facts.answers.get("torch")
    if answer is None or answer.value is None:
        why = answer.error if answer else "not tried"
        way_out = f"pip install --force-reinstall 'torch{facts.pins.get('torch', '')}'"
        return Finding("torch", "fail", f"cannot be imported: {why}", way_out)
    version = str(answer.value["version"])
    cuda, hip = answer.value["cuda"], answer.value["hip"]
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "for the CPU"
    found = f"{version} ({build})"
    wanted = facts.pins.get("torch", "")
    if not _fits(version, wanted):
        way_out = f"pip install 'torch{wanted}'"
        return Finding("torch", "warn", f"{found}, but vLLM was built for {wanted}", way_out)
    return Finding("torch", "pass", found)


def check_triton(facts: Facts) -> Finding:
    """Triton, which the kernels on a GPU are written in."""
    needed = bool(facts.value("torch").get("cuda"))
    answer = facts.answers.get("triton")
    version = facts.versions.get("triton") or facts.value("triton").get("version", "")
    wanted = facts.pins.get("triton", "")
    way_out = f"pip install 'triton{wanted}'"
    if "triton" not in facts.modules:
        if needed:
            return Finding("triton", "fail", "not installed", way_out)
        return Finding("triton", "pass", "not installed, and not needed on a CPU")
    if answer is None or answer.value is None:
        why = answer.error if answer else "not tried"
        status: Status = "fail" if needed else "warn"
        return Finding("triton", status, f"cannot be imported: {why}", way_out)
    if needed and not _fits(version, wanted):
        found = f"{version}, but torch was built for {wanted}"
        return Finding("triton", "warn", found, way_out)
    return Finding("triton", "pass", version if needed else f"{version}, not needed on a CPU")


def check_compiler(facts: Facts) -> Finding:
    """What Triton, and torch.compile on a CPU, compile their launchers with."""
    on_gpu = bool(facts.value("torch").get("cuda"))
    compiler = "c" if on_gpu else "c++"
    if compiler not in facts.compilers:
        user = "Triton" if on_gpu else "torch.compile"
        found = f"no {compiler.upper()} compiler, which {user} needs"
        return Finding("compiler", "fail" if on_gpu else "warn", found, "install gcc and g++")
    if "Python.h" not in facts.compilers:
        way_out = "install Python's headers (package python3-dev or python3-devel)"
        return Finding("compiler", "warn", "Python.h, which launchers include, is missing", way_out)
    return Finding("compiler", "pass", f"{compiler.upper()} compiler and Python.h")


def check_media(facts: Facts) -> list[Finding]:
    """Packages that transformers imports if they are there, and fails with if they are broken."""
    findings = []
    for name in ("torchvision", "torchaudio", "transformers"):
        answer = facts.answers.get(name)
        if answer and answer.error:
            version = facts.versions.get(name, "")
            way_out = f"install the {name} that goes with your torch"
            if name == "transformers":
                way_out = "mend the package that the message names, or install vLLM anew"
            else:
                way_out += f", or pip uninstall {name}"
            found = f"{version} cannot be imported: {answer.error}".strip()
            findings.append(Finding(name, "warn", found, way_out))
        elif name == "transformers" and name in facts.modules:
            findings.append(Finding(name, "pass", facts.versions.get(name, "importable")))
    return findings


def check_entry_point(facts: Facts) -> Finding:
    """Whether vLLM finds the plugin, loads it, and then knows its method."""
    name = "entry point"
    if _ENTRY_POINT not in facts.entry_points:
        other = f", only {', '.join(facts.entry_points)}" if facts.entry_points else ""
        found = f"vllm.general_plugins has no nanoquant = {_ENTRY_POINT}{other}"
        return Finding(name, "fail", found, "install the plugin with the pip of this environment")
    allowed = facts.environ.get("VLLM_PLUGINS")
    # As vLLM reads it: a space after a comma belongs to the name.
    if allowed is not None and "nanoquant" not in allowed.split(","):
        way_out = "unset it, or add nanoquant, separated by commas without spaces"
        return Finding(name, "fail", f"VLLM_PLUGINS={allowed!r} leaves nanoquant out", way_out)
    if len(facts.entry_points) > 1:
        found = f"registered {len(facts.entry_points)} times: {', '.join(facts.entry_points)}"
        return Finding(name, "fail", found, "uninstall all but one vllm-nanoquant")
    if not facts.value("vllm"):
        return Finding(name, "warn", "registered; not loaded, for want of vLLM", "mend vLLM first")
    answer = facts.answers.get("plugin")
    if answer is None or answer.value is None:
        why = answer.error if answer else "not tried"
        return Finding(name, "fail", f"does not load: {why}", "mend what the message names")
    return Finding(name, "pass", f"vLLM knows {answer.value['method']}")


def check_bytecode_hook(facts: Facts) -> Finding:
    """The environment variable that `nanoquant_w4a16` refuses to start with."""
    value = forced_bytecode_hook(facts.environ)
    if value is not None:
        found = f"{BYTECODE_HOOK}={value}, which nanoquant_w4a16 does not run under"
        return Finding("compile hook", "fail", found, f"unset {BYTECODE_HOOK}, or set it to 0")
    state = "is 0" if BYTECODE_HOOK in facts.environ else "is not set"
    return Finding("compile hook", "pass", f"{BYTECODE_HOOK} {state}")


def _fits(version: str, wanted: str) -> bool:
    """Whether a release is among those wanted; builds (+cu130, +cpu) are not compared."""
    try:
        release = Version(version).public
        return not wanted or SpecifierSet(_without_builds(wanted)).contains(
            release, prereleases=True
        )
    except (InvalidSpecifier, InvalidVersion):
        return True


def _without_builds(wanted: str) -> str:
    return ",".join(part.partition("+")[0] for part in wanted.split(","))
