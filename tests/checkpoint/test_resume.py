# SPDX-License-Identifier: Apache-2.0
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.checkpoint.small import content, weights, write_stock
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.recipe import Recipe

JOURNAL = ".nanoquant_progress.jsonl"
SHARD_BYTES = 6_000

# Runs the job in forked children. The first dies without any clean-up at its nth call of a function
# that changes the disk; the second is to finish. Prints how many calls there were.
DIE_ANYWHERE = """
import os, sys
from pathlib import Path
import torch
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.recipe import Recipe
import vllm_nanoquant.quantize.algorithms

torch.set_num_threads(1)
CHANGES = {"write", "flush", "replace", "rename", "fsync", "truncate", "unlink", "open", "close",
           "mkdir", "sendfile", "copyfile"}
source, targets, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def run(target, die_at=None):
    count = 0
    def watch(frame, event, function):
        nonlocal count
        if event != "c_call" or function.__name__ not in CHANGES:
            return
        # Asking for a package's version parses text, with functions of these names.
        if not any(part in frame.f_code.co_filename for part in ("email", "metadata", "zipfile")):
            count += 1
            if count == die_at:
                os._exit(9)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        job = prepare(Request(str(source), source, target, Recipe(), shard_bytes))
        sys.setprofile(watch)
        if not job.is_done():
            job.run()
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)

deaths = 0
while True:
    target = targets / str(deaths)
    status = run(target, deaths + 1)
    assert status in (0, 9), status
    if status == 9:
        assert run(target) == 0
    if status == 0:
        break
    deaths += 1
print(deaths)
"""


def job_of(source, target, **recipe):
    return prepare(Request(str(source), source, target, Recipe.parse(recipe), SHARD_BYTES))


@pytest.fixture
def memory_folder():
    """A folder in memory where there is one: what a kill leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.mark.slow
def test_killed_at_every_change_of_the_disk_the_result_is_the_same(memory_folder):
    # A file with one tensor that is copied, and a file with two that are quantized.
    few = ("embeddings.weight", "in_proj.weight", "out_proj.weight")
    tensors = {name: tensor for name, tensor in weights(wide=32).items() if name.endswith(few)}
    source, shard_bytes = write_stock(memory_folder / "source", tensors), 4000
    whole, killed = memory_folder / "whole", memory_folder / "killed"
    prepare(Request(str(source), source, whole, Recipe(), shard_bytes)).run()
    expected = content(whole)
    assert sum(name.endswith(".safetensors") for name in expected) == 2
    killed.mkdir()
    command = [sys.executable, "-c", DIE_ANYWHERE, str(source), str(killed), str(shard_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    deaths = int(done.stdout)
    # For each of 3 tensors a write, a flush, a line of the journal and a flush; for each of 7 files
    # what it takes to make them durable.
    assert deaths > 60
    for death in range(deaths + 1):
        assert content(killed / str(death)) == expected, death


@pytest.mark.slow
def test_killed_by_a_signal_at_random_moments(tmp_path):
    source = write_stock(tmp_path / "source", weights(wide=3000))
    command = [sys.executable, "-m", "vllm_nanoquant", "quantize", str(source)]
    command += ["--max-shard-size", "1MB"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    duration = time.monotonic() - start
    moments = random.Random(0)
    killed = 0
    for attempt in range(4):
        target = tmp_path / str(attempt)
        for _ in range(3):
            process = subprocess.Popen([*command, str(target)], stderr=subprocess.DEVNULL)
            try:
                process.wait(moments.uniform(duration / 2, duration))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
        subprocess.run([*command, str(target)], check=True, capture_output=True)
        assert content(target) == content(tmp_path / "whole")
    assert killed > 2


class Stop(BaseException):
    pass


def stop_after(job, tensors):
    """Run a job until some tensors are done."""
    count = 0

    def progress(_):
        nonlocal count
        count += 1
        if count == tensors:
            raise Stop

    with pytest.raises(Stop):
        job.run(progress)


@pytest.fixture
def begun(tmp_path):
    """A source, and a target that was left after seven tensors."""
    source = write_stock(tmp_path / "source", weights(wide=32))
    stop_after(job_of(source, tmp_path / "target"), 7)
    return source, tmp_path / "target"


def test_without_config_and_index_until_the_end(begun):
    _, target = begun
    assert not {"config.json", "model.safetensors.index.json"} & content(target).keys()


def test_finished_tensors_are_not_made_again(begun, monkeypatch):
    source, target = begun
    made = []
    job = job_of(source, target)
    original = job.source.chunks, job.source.load
    for name, function in zip(("chunks", "load"), original, strict=True):
        monkeypatch.setattr(job.source, name, lambda key, f=function: made.append(key) or f(key))
    job.run()
    assert made == [step.key for step in job.steps][-6:]


def test_bytes_that_were_lost_are_made_again(begun, tmp_path):
    source, target = begun
    partial = next(target.glob(".model*.partial"))
    data = bytearray(partial.read_bytes())
    data[-5] ^= 1
    partial.write_bytes(data)
    shard = target / sorted(name for name in content(target) if name.startswith("model-"))[0]
    shard.write_bytes(shard.read_bytes()[:-3])
    job_of(source, target).run()
    job_of(source, tmp_path / "whole").run()
    assert content(target) == content(tmp_path / "whole")


def test_a_line_of_the_journal_that_was_cut_short(begun, tmp_path):
    source, target = begun
    journal = target / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    stop_after(job_of(source, target), 9)
    job_of(source, target).run()
    job_of(source, tmp_path / "whole").run()
    assert content(target) == content(tmp_path / "whole")


@pytest.mark.parametrize("what", ["recipe", "source", "shard size", "version of torch"])
def test_other_settings_are_refused_by_name(begun, what, monkeypatch):
    source, target = begun
    job = job_of(source, target, group_size=32 if what == "recipe" else 128)
    if what == "shard size":
        job = prepare(Request(str(source), source, target, Recipe(), SHARD_BYTES + 1))
    if what == "source":
        config = json.loads((source / "config.json").read_text()) | {"new": 1}
        (source / "config.json").write_text(json.dumps(config))
        job = job_of(source, target)
    if what == "version of torch":
        monkeypatch.setattr("torch.__version__", "1.0")
    before = content(target)
    with pytest.raises(UsageError, match=f"begun with another {what};"):
        job.run()
    assert content(target) == before


def test_a_source_that_changes_in_between_is_noticed(begun):
    source, target = begun
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the source has changed since"):
        job_of(source, target).run()


def test_a_source_that_was_only_touched_is_the_same(begun):
    source, target = begun
    for path in source.iterdir():
        os.utime(path, (1, 1))
    job_of(source, target).run()


def test_a_complete_result_is_recognised(begun):
    source, target = begun
    job = job_of(source, target)
    assert not job.is_done()
    job.run()
    assert job.is_done()
    assert not job_of(source, target, group_size=64).is_done()
    with pytest.raises(UsageError, match="not empty"):
        job_of(source, target, group_size=64).run()


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"[1]\n", b"\xff\n", b'{"begun_with": 3}\n'])
def test_a_journal_that_is_none(tmp_path, text):
    source = write_stock(tmp_path / "source", weights(wide=32))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / JOURNAL).write_bytes(text)
    with pytest.raises(CheckpointError, match=JOURNAL):
        job_of(source, tmp_path / "target").run()
