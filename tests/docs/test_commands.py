# SPDX-License-Identifier: Apache-2.0
"""Every command and snippet of the README and of docs/, checked by kind; see commands.py.

Where a page speaks of the real model, the shipped one stands in for it, or its geometry without
weights where only vLLM's configuration is made. What a page reads and does not write is made first.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from _server import Server
from packaging.requirements import Requirement

from tests.checkpoint.foreign import DOWN, UP, under, write
from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from tests.docs import commands
from tests.docs.commands import COMPILED, ENGINE, PAGES, PARSED, ROOT, RUN, SERVER, STARTED
from vllm_nanoquant.cli.main import main, make_parser

pytestmark = pytest.mark.slow

REAL = ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "MODEL", "SRC")
TINY = "models/tiny-nemotron-h"
GEOMETRY = ROOT / "benchmarks/geometry/nemotron-nano-9b-v2"
HERE = Path(__file__).parent
TEMPLATE = ROOT / "tests/serving/nemotron_v2.jinja"
LOCALHOST = re.compile(r"http://(?:localhost|127\.0\.0\.1|0\.0\.0\.0):\d+")
ALL = [(page, list(commands.commands_of(page)), list(commands.snippets_of(page))) for page in PAGES]
COMMANDS = [command for _, found, _ in ALL for command in found]
SNIPPETS = [snippet for _, _, found in ALL for snippet in found]
# What requests call the model; the server answers to each.
MODEL_NAMES = {TINY} | {
    name
    for text in [*(c.text for c in COMMANDS if c.program == "curl"), *(s.code for s in SNIPPETS)]
    for name in re.findall(r'"?model"?\s*[=:]\s*"([^"]+)"', text)
}


def kind_or_none(command):
    """Kind of a command; None for one that `test_every_command_has_a_kind` refuses."""
    try:
        return commands.kind_of(command)
    except commands.Unknown:
        return None


def kept(kinds):
    """Commands of these kinds, as parameters named by their place."""
    found = [command for command in COMMANDS if kind_or_none(command) in kinds]
    return [pytest.param(c, id=f"{c.page}:{c.line}") for c in found]


def test_every_command_has_a_kind(record_property):
    counted = Counter(commands.kind_of(command) for command in COMMANDS)
    counted += Counter(snippet.kind for snippet in SNIPPETS)
    for kind in commands.KINDS:
        record_property(kind, counted[kind])
        print(f"{counted[kind]:4} {kind}")
    assert set(counted) == set(commands.KINDS)
    assert counted[STARTED] == 1


def test_no_command_hides_in_an_unmarked_block():
    program = re.compile(r"^(?:    )?(?:nanoquant|vllm|make|pip|curl|docker|kubectl) \w.*$", re.M)
    for page in PAGES:
        text = re.sub(r"^( *)```\w*\n.*?^\1```$", "", page.read_text(), flags=re.M | re.S)
        indented = [line for line in program.findall(text) if line.startswith("    ")]
        assert indented == [], page
        for _, block in commands.blocks(page, ""):
            assert not re.match(r"\$ |(?:vllm serve|make|pip install) ", block), (page, block)


def foreign(folder):
    """A checkpoint of compressed-tensors, whose zero points are whole."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": False,
             "strategy": "group", "group_size": 32}}  # fmt: skip
    options = {"quant_method": "compressed-tensors", "format": "pack-quantized",
               "config_groups": {"group_0": group}, "ignore": []}  # fmt: skip
    tensors = {
        **under(UP, packers.pack_quantized(Int4(16, 96, 32, seed=1))),
        **under(DOWN, packers.pack_quantized(Int4(24, 160, 32, seed=2))),
    }
    return write(folder, options, tensors)


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "int4"
    assert main(["quantize", str(ROOT / TINY), str(folder)]) == 0
    return folder


class Place:
    """A folder in which the commands of one page run, one after the other."""

    def __init__(self, folder, int4):
        self.folder, self._int4 = folder, int4
        (folder / "models").mkdir()
        (folder / TINY).symlink_to(ROOT / TINY)
        foreign(folder / "nano-9b-w4a16")

    def words(self, command):
        """Arguments of a command, with the shipped model for the real one and what is missing."""
        words = [TINY if word in REAL else word for word in command.words[1:]]
        # SRC and DST of the two that write; the others read the first.
        writes = words[0] in ("quantize", "convert")
        for position, word in enumerate(words[1:], 1):
            reads = position == 1 or words[position - 1] == "--against"
            path = self.folder / word
            if word.startswith("-") or not reads or path.exists() or re.fullmatch(r"\S+/\S+", word):
                continue
            shutil.copytree(self._int4, path)
        if writes and "--dry-run" not in words:
            target = self.folder / words[2]
            shutil.rmtree(target, ignore_errors=True)
        return words


@pytest.fixture(scope="module")
def places(tmp_path_factory, int4):
    made = {}

    def place(page):
        if page not in made:
            made[page] = Place(tmp_path_factory.mktemp(page.removesuffix(".md")), int4)
        return made[page]

    return place


@pytest.fixture(scope="module")
def doctored():
    """Exit status of `nanoquant doctor`, which takes seconds and is on several pages.

    The machine that runs this may lack what doctor asks for; that is its to say.
    """
    return main(["doctor"])


@pytest.mark.parametrize("command", kept({RUN}))
def test_nanoquant_does_what_the_page_says(command, places, monkeypatch, capsys, doctored):
    place = places(command.page)
    monkeypatch.chdir(place.folder)
    words = place.words(command)
    if words == ["doctor"]:
        assert doctored in (0, 1)
        return
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


class Parsed(Exception):
    """Arguments were read."""


@pytest.fixture
def only_parse(monkeypatch):
    """Makes any program stop behind its own parser."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *given, **named):
        parse(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(ROOT)

    def run(form, name, arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        if form == "script":
            sys.path.insert(0, str((ROOT / name).parent))
        parsed = False
        try:
            if form == "script":
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except Parsed:
            parsed = True
        # A script without options has no parser, and was run.
        assert parsed or not arguments

    return run


@pytest.mark.parametrize("command", kept({PARSED}))
def test_the_programs_own_parser_reads_it(command, only_parse, engine_results):
    words = command.words
    if words[0] == "nanoquant":
        options, more = make_parser().parse_known_args(list(words[1:]))
        # `serve` hands on what it does not know; what vLLM thinks of it is asked with the engines.
        assert not more or getattr(options, "takes_more", False), more
        assert engine_results.get(command.place) is None
    elif words[0] == "vllm":
        assert engine_results[command.place] is None
    else:
        only_parse(*commands.python_of(words))


@pytest.mark.parametrize("command", kept({commands.MAKE}))
def test_the_target_exists(command):
    done = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", kept({commands.PIP}))
def test_what_pip_installs(command):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    words = list(command.words[command.words.index("install") + 1 :])
    while words:
        word = words.pop(0)
        if word in ("-r", "--requirement"):
            assert (ROOT / words.pop(0)).is_file()
        elif word in ("--index-url", "--extra-index-url", "--target", "-t"):
            words.pop(0)
        elif word.startswith((".", "vllm-nanoquant")):
            asked = re.findall(r"[\w-]+", (re.findall(r"\[(.*)\]", word) or [""])[0])
            assert set(asked) <= set(extras)
        elif word.startswith("git+"):
            assert re.fullmatch(r"git\+https://\S+@[0-9a-f]{40}", word), "pin a commit"
        elif not word.startswith("-") and not word.endswith(".whl"):
            Requirement(word)


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{c.page}:{c.line}") for c in COMMANDS])
def test_files_that_it_names_exist(command):
    for path in commands.files_named(command.words):
        assert (ROOT / path).exists(), path


def for_engine(words, int4, real, wide):
    """Arguments of `vllm serve` with what is here in the place of models.

    Args:
        words: as on the page, without the program.
        int4: an int4 checkpoint of the shipped model.
        real: the real model's geometry.
        wide: the same as an int4 checkpoint, for what the shipped model is too small for.
    """
    large = any(word.endswith("-parallel-size") or word == "--max-model-len" for word in words)
    models = dict.fromkeys(REAL, str(real)) | {TINY: str(ROOT / TINY)}
    models["nano-9b-int4"] = models["tiny-int4"] = str(wide if large else int4)
    return [models.get(word, word) for word in words]


@pytest.fixture(scope="module")
def engine_results(tmp_path_factory, int4):
    """What vLLM says of each command and snippet that starts an engine, by its place."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "recipe.json").write_text('{"preset": "full", "group_size": 64}')
    real, wide = folder / "real", folder / "wide"
    shutil.copytree(GEOMETRY, real)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / TINY / name, real)
    shutil.copytree(real, wide)
    config = json.loads((wide / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "nanoquant_w4a16"}
    (wide / "config.json").write_text(json.dumps(config))
    models = int4, real, wide
    jobs = {}
    for command in COMMANDS:
        kind, words = kind_or_none(command), list(command.words)
        if kind in (ENGINE, STARTED):
            words = for_engine(words[2:] if words[0] == "vllm" else words[3:], *models)
            jobs[command.place] = ["serve", words]
        elif kind == PARSED and words[0] == "vllm":
            jobs[command.place] = ["bench", words[2:]]
        elif kind == PARSED and words[:2] == ["nanoquant", "serve"]:
            _, more = make_parser().parse_known_args(words[1:])
            given = more if words[2] in more else [words[2], *more]
            jobs[command.place] = ["serve", for_engine(given, *models)]
    for snippet in SNIPPETS:
        for number, engine in enumerate(snippet.engines):
            (model,) = for_engine([engine["model"]], *models)
            arguments = engine | {"model": model}
            jobs[f"{snippet.page}:{snippet.line}:{number}"] = ["LLM", arguments]
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_configs.py"), "jobs.json", "results.json"],
        cwd=folder,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return dict(zip(jobs, json.loads((folder / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("command", kept({ENGINE, STARTED}))
def test_vllm_makes_its_configuration(command, engine_results):
    error = engine_results[command.place]
    # Ray is an extra of vLLM's; its absence is found after everything else was parsed.
    assert error is None or ("ray" in command.words and "Failed to import Ray" in error), error


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server started by the command of the quick start; it answers to every model's name."""
    (command,) = (c for c in COMMANDS if kind_or_none(c) == STARTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, *command.words[1:]]
    words += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name"]
    words += sorted(MODEL_NAMES)
    words += ["--enable-auto-tool-choice", "--tool-call-parser", "nanoquant_nemotron_v2"]
    words += ["--reasoning-parser", "nanoquant_nemotron_v2", "--chat-template", str(TEMPLATE)]
    words[words.index("--model") + 1] = str(ROOT / TINY)
    log = tmp_path_factory.mktemp("docs-server") / "server.log"
    address = f"http://127.0.0.1:{port}"
    with Server(words, log, f"{address}/health") as server:
        server.wait("starting vLLM", 300)
        yield address


@pytest.mark.parametrize("command", kept({SERVER}))
def test_a_server_answers(command, url):
    words = [LOCALHOST.sub(url, word) for word in command.words[1:]]
    assert any(word.startswith(url) for word in words), "not of this machine"
    done = subprocess.run(
        ["curl", "--fail-with-body", "--silent", "--show-error", "--noproxy", "*", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout or "/health" in " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_from_top_to_bottom(page, tmp_path, monkeypatch, request, engine_results):
    names = {"__name__": "__main__"}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    for snippet in commands.snippets_of(page):
        code = snippet.code
        place = f"{page.name}:{snippet.line}"
        if snippet.kind == COMPILED:
            for number in range(len(snippet.engines)):
                assert engine_results[f"{place}:{number}"] is None
            continue
        if snippet.kind == SERVER:
            code = LOCALHOST.sub(request.getfixturevalue("url"), code)
            code = code.replace('api_key="none"', 'api_key="none", timeout=120')
        exec(compile(code, place, "exec"), names)
