# SPDX-License-Identifier: Apache-2.0
"""What goes wrong is one line, an exit status and, if asked for, a JSON object."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: COMMAND"),
        (["magic"], "invalid choice: 'magic'"),
        (["quantize", "SRC"], "required: DST"),
        (["quantize", "nothing", "DST"], "'nothing' is not a folder that exists, nor a model"),
        (["quantize", "./nothing", "DST"], "'./nothing' is not a folder that exists"),
        (["quantize", "SRC", "SRC"], "is the source, in it or around it"),
        (["quantize", "SRC", "DST", "--preset", "fast"], "preset = 'fast'"),
        (["quantize", "SRC", "DST", "--group-size", "48"], "group_size = 48"),
        (["quantize", "SRC", "DST", "--algorithm", "magic"], "algorithm = 'magic'"),
        (["quantize", "SRC", "DST", "--algorithm", "gptq"], "--calibration-text FILE belong"),
        (["quantize", "SRC", "DST", "--calibration-text", "x"], "--calibration-text FILE belong"),
        (["quantize", "SRC", "DST", "--ignore", "*.inproj"], "'*.inproj'"),
        (["quantize", "SRC", "DST", "--override", "lm_head=8"], "lm_head.bits = 8"),
        (["quantize", "SRC", "DST", "--override", "lm_head"], "is not of the form PATTERN=4/32"),
        (["quantize", "SRC", "DST", "--max-shard-size", "big"], "is not a size like 4.5GB"),
        (["quantize", "SRC", "DST", "--device", "abacus"], "has no such device"),
        (["quantize", "SRC", "DST", "--device", "meta"], "has no such device"),
        (["quantize", "SRC", "DST", "--revision", "main"], "--revision main is for models"),
        (["verify", "nothing"], "nothing is not a folder"),
        (["inspect", "./nothing"], "'./nothing' is not a folder that exists"),
        (["card", "SRC"], "has no nanoquant_report.json"),
    ],
)
def test_wrong_usage(run, source, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    places = {"SRC": source, "DST": tmp_path / "target"}
    status, out, err = run(*(places.get(each, each) for each in arguments))
    assert (status, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert not (tmp_path / "target").exists()


FAILURES = [
    ("quantize",),
    ("quantize", "SRC", "DST", "--group-size", "48"),
    ("quantize", "./nothing", "DST"),
    ("quantize", "SRC", "FULL"),
    ("verify", "nothing"),
    ("inspect", "EMPTY"),
    ("card", "SRC"),
    ("convert", "SRC", "DST"),
]


@pytest.mark.parametrize("arguments", FAILURES, ids=" ".join)
def test_a_failure_is_one_line_and_with_json_an_object(run, source, tmp_path, arguments):
    places = {"SRC": source, "DST": tmp_path / "dst"}
    for name, files in {"FULL": ["thesis.tex"], "EMPTY": []}.items():
        places[name] = tmp_path / name
        places[name].mkdir()
        for file in files:
            (places[name] / file).write_text("years of work")
    given = [places.get(each, each) for each in arguments]
    status, out, err = run(*given)
    assert (status, out) == (2, "")
    assert err.startswith("nanoquant: error: ")
    assert err.count("\n") == 1
    again = run(*given, "--json")
    assert (again[0], again[2]) == (status, err)
    assert f"nanoquant: error: {json.loads(again[1])['error']}\n" == err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_does_not_take_it(run, source, tmp_path, monkeypatch, number):
    def fails(self, *arguments, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_bytes", fails)
    status, out, err = run("quantize", source, tmp_path / "target", "--json")
    assert status == 1
    assert json.loads(out)["error"] in err
    assert f"{tmp_path}/target/" in err and os.strerror(number) in err
    assert err.count("\n") == 1
    assert ("run the same command again" in err) == (number == errno.ENOSPC)


def test_ctrl_c_with_json(run, source, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_nanoquant.checkpoint.verify.verify", interrupted)
    status, out, err = run("verify", source, "--json")
    assert (status, json.loads(out)) == (130, {"error": "interrupted"})
    assert err == "\nnanoquant: interrupted\n"


def test_a_closed_pipe_is_no_error(source):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vllm_nanoquant", "inspect", str(source)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_cannot_be_written_is_named(run, source, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run("quantize", source, tmp_path / "file/target")
    assert status in (1, 2)
    assert str(tmp_path / "file") in err
