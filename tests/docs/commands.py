# SPDX-License-Identifier: Apache-2.0
"""The commands and snippets of the documentation, found in its pages and sorted by kind.

A command that is of no kind is an error: whoever writes it says here how it is checked.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Kinds, from the strongest check to the weakest.
RUN = "run for real on the shipped model"
SERVER = "sent to a real server"
STARTED = "started for real: the server of this test"
ENGINE = "engine configuration made by vLLM"
PARSED = "read by the program's own parser"
MAKE = "target exists (make -n)"
PIP = "extras exist, requirements are well formed"
NAMED = "known program, and files of the repository that it names exist"
COMPILED = "compiled; its engine's configuration made by vLLM"
KINDS = (STARTED, RUN, SERVER, ENGINE, COMPILED, PARSED, MAKE, PIP, NAMED)

# What `nanoquant` does here for real; the others start servers or take long, and are parsed.
_RUN = {"quantize", "convert", "verify", "inspect", "card", "doctor", "plan"}
_ONLY_ON_A_GPU = {"cuda", "cuda:0"}
_SERVERS = {"vllm.entrypoints.openai.api_server"}
# Not ours, and not here: docker, kubectl and Ray need a daemon or a cluster, the rest a network.
_KNOWN = {
    *("docker", "docker-compose", "kubectl", "oc", "helm", "ray", "git", "gh", "hf", "nvidia-smi"),
    *("lm_eval", "guidellm", "bfcl", "ns", "huggingface-cli", "hadolint", "promtool", "twine"),
    *("kubeconform", "mkdir", "cp", "rm", "ls", "cat", "jq", "grep", "head", "tee", "source", "."),
    *("nvcc", "uv", "pipx", "watch", "df", "chmod", "mv", "sleep", "kill", "sha256sum", "apt-get"),
}  # fmt: skip
_KNOWN_MODULES = {"build", "twine", "venv", "pip", "json.tool", "http.server", "zipfile"}
_SHELL = {"export", "cd", "set", "unset"}
_ENDS = {"|", "||", "&&", ";", "&"}
_REDIRECTS = {">", ">>", "2>", "<", "<<", ">&", "&>"}
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


class Unknown(ValueError):
    """A command of no kind."""


@dataclass(frozen=True)
class Command:
    """One command as a page has it.

    Attributes:
        page: name of the page.
        line: number of the line where it begins.
        words: program and arguments, without assignments and redirections.
        text: as it is written.
    """

    page: str
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def program(self):
        """The program, also where it is that of a virtual environment: ``env/bin/pip``."""
        return re.sub(r"^[\w.-]+/bin/", "", self.words[0])

    @property
    def place(self):
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page, language):
    """(line, text) of each fenced block of a language, its indentation taken away."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found[2] == language:
            line = text.count("\n", 0, found.start()) + 2
            yield line, re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)


def commands_of(page):
    """Every command of a page's sh blocks; those joined by pipes and the like one by one."""
    for line, block in blocks(page, "sh"):
        lines = block.split("\n")
        number = 0
        while number < len(lines):
            first, text = number, lines[number]
            while text.endswith("\\"):
                number += 1
                text = text[:-1] + lines[number].strip()
            number += 1
            for words in _split(text):
                yield Command(page.name, line + first, words, text.strip())


def _split(text):
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, skip = [], False
    for word in [*lexer, ";"]:
        if word in _ENDS:
            while words and _ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words:
                yield tuple(words)
            words = []
        elif skip or word in _REDIRECTS:
            skip = word in _REDIRECTS
        elif set(word) & set("()<>") and not word.strip("()<>"):
            raise Unknown(f"{text}: quote {word!r}")
        else:
            words.append(word)


def python_of(words):
    """What ``python`` runs: ("module" or "script", name, arguments); None for anything else."""
    rest = words[1:]
    if rest[:1] == ("-m",) and len(rest) > 1:
        return "module", rest[1], rest[2:]
    if rest and rest[0].endswith(".py"):
        return "script", rest[0], rest[1:]
    return None


def kind_of(command):
    """How a command is checked.

    Raises:
        Unknown: nothing here says how.
    """
    words, program = command.words, command.program
    if program == "nanoquant":
        return _kind_of_nanoquant(words)
    if program == "vllm" and words[1:2] == ("serve",):
        return ENGINE
    if program == "vllm" and words[1:2] == ("bench",):
        return PARSED
    if program == "curl":
        return SERVER
    if program == "make":
        return MAKE
    if program in ("pip", "pip3"):
        return PIP
    if program in ("python", "python3"):
        return _kind_of_python(command)
    if program in _KNOWN | _SHELL or program.startswith("./"):
        return NAMED
    raise Unknown(f"{command.place}: no kind for {program!r}; add it to tests/docs/commands.py")


def _kind_of_nanoquant(words):
    if set(words) & _ONLY_ON_A_GPU or "gptq" in words:
        return PARSED
    return RUN if words[1:2] and (words[1] in _RUN or "--dry-run" in words) else PARSED


def _kind_of_python(command):
    found = python_of(command.words)
    if found is None:
        raise Unknown(f"{command.place}: neither a module nor a script")
    form, name, arguments = found
    if form == "script":
        return PARSED
    if name in _SERVERS:
        started = STARTED if "models/tiny-nemotron-h" in arguments else ENGINE
        return started if command.page == "quickstart.md" else ENGINE
    if name == "pip":
        return PIP
    if name.startswith("vllm_nanoquant"):
        return PARSED
    if name in _KNOWN_MODULES:
        return NAMED
    raise Unknown(f"{command.place}: no kind for module {name}")


@dataclass(frozen=True)
class Snippet:
    """A block of Python.

    Attributes:
        page: name of the page.
        line: number of its first line.
        code: its text.
        engines: arguments of the engines that it starts, as ``LLM(...)`` is given them.
        kind: how it is checked.
    """

    page: str
    line: int
    code: str
    engines: tuple[dict, ...]
    kind: str


def snippets_of(page):
    """Every Python block of a page."""
    for line, code in blocks(page, "python"):
        tree = ast.parse(code, f"{page.name}:{line}")
        imported = {
            alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (
                [ast.alias(node.module)] if isinstance(node, ast.ImportFrom) else node.names
            )
        }
        engines = tuple(
            ({"model": ast.literal_eval(call.args[0])} if call.args else {})
            | {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "LLM"
        )
        kind = COMPILED if engines else SERVER if "openai" in imported else RUN
        yield Snippet(page.name, line, code, engines, kind)


def files_named(words):
    """Paths of the repository that a command names and does not write: they must exist."""
    tops = {path.name for path in ROOT.iterdir()} - {"build", "dist"}
    for before, word in zip(("", *words), words, strict=False):
        for part in word.split("=")[-1].split():
            path = Path(part.partition("::")[0])
            if "/" not in part or path.parts[0] not in tops or "*" in part:
                continue
            yield path.parent if before in ("--output", "-o", "--out") else path
