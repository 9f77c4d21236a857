# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark without a GPU: its command line, a fake timer and fake contestants."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import run
from benchmarks.kernels.layers import LAYERS, Layer
from benchmarks.kernels.options import Options, parse_options
from benchmarks.kernels.peers import CONTESTANTS, NAMES, load
from benchmarks.kernels.peers.base import GroupRefused, Peer, Refused, importable
from benchmarks.kernels.peers.bf16 import DenseWeight
from benchmarks.kernels.peers.symmetric import pack_eight, quantize_symmetric
from benchmarks.kernels.report import Report
from tests.benchmarks.mistakes import said
from vllm_nanoquant.kernels import timing
from vllm_nanoquant.kernels.accuracy import relative_error

ROOT = Path(__file__).parents[2]
SMALL = Layer("small", 24, 64)
NARROW = Layer("narrow", 8, 96, most_tokens=2)


@dataclasses.dataclass(frozen=True)
class FakeWeight(DenseWeight):
    """A dense weight with an offset between what it claims and what it returns."""

    offset: float = 0.0
    group_size: int | None = None

    def copy(self):
        return dataclasses.replace(self, weight=self.weight.clone())

    def call(self, x):
        return super().call(x) + self.offset


def peer(name: str, offset: float = 0.0, **limits) -> Peer:
    return Peer(name, lambda dense, size: FakeWeight(dense, size, offset), **limits)


def refusing(name: str, reason: Exception) -> Peer:
    def prepare(dense, group_size):
        raise reason

    return Peer(name, prepare)


def only_groups_of_32(dense, group_size):
    if group_size > 32:
        raise GroupRefused(f"not {group_size}")
    return FakeWeight(dense, group_size=group_size)


class FakeTimer:
    """Makes each call once; each figure is a microsecond more than the one before."""

    def __init__(self):
        self.times = 0
        self.calls = []
        self.warm_ups = []

    def __call__(self, calls, replays, warm_up_us):
        self.calls.append([call() for call in calls])
        self.warm_ups.append(warm_up_us)
        self.times += 1
        return timing.Times(self.times, self.times - 0.5, self.times + 0.25)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    """Two copies of the weight of SMALL, as bf16."""
    monkeypatch.setattr(timing, "ROTATED_BYTES", 24 * 64 * 2 + 1)


def measure(peers, output=None, timer=None, tokens=(1, 4), layers=(SMALL,), names=("ours",)):
    options = Options(output, layers, tokens, names, group_size=128, replays=3)
    report = Report(run.describe_problem(options), {"name": "no GPU"}, {"torch": "0"})
    return run.benchmark(options, peers, timer or FakeTimer(), torch.device("cpu"), report)


def test_a_figure_has_its_times_its_error_and_its_group_size(tmp_path, capsys):
    output = tmp_path / "result.json"
    timer = FakeTimer()
    small_groups = Peer("small_groups", only_groups_of_32)

    measure([load("bf16"), small_groups], output, timer)

    written = json.loads(output.read_text())
    assert written["complete"]
    assert [(row["tokens"], row["peer"], row["us"]) for row in written["results"]] == [
        (1, "bf16", 1),
        (1, "small_groups", 2),
        (4, "bf16", 3),
        (4, "small_groups", 4),
    ]
    first, second = written["results"][:2]
    assert (first["n"], first["k"], first["us_least"], first["us_greatest"]) == (24, 64, 0.5, 1.25)
    assert first["group_size"] is None and second["group_size"] == 32
    # BF16's rounding of the result alone.
    assert 0 < first["error"] < 3e-3
    assert [len(calls) for calls in timer.calls] == [2, 2, 2, 2]
    assert f"error {first['error']:.1e}" in capsys.readouterr().out


def test_refusals_are_printed_and_kept_and_end_nothing(tmp_path, capsys):
    output = tmp_path / "result.json"
    peers = [
        refusing("absent", Refused("cannot import absent")),
        refusing("broken", RuntimeError("no such op\nsecond line")),
        refusing("groups", GroupRefused("none")),
        peer("nan", torch.nan),
        peer("wrong", 1.0),
        load("bf16"),
    ]

    measure(peers, output, tokens=(4,))

    written = json.loads(output.read_text())
    assert [row["peer"] for row in written["results"]] == ["bf16"]
    reasons = {refusal["peer"]: refusal["reason"] for refusal in written["refused"]}
    assert reasons["absent"] == "cannot import absent"
    assert reasons["broken"] == "RuntimeError: no such op"
    assert reasons["groups"] == "none; none; none"
    assert reasons["nan"] == "wrong result: mean relative error nan"
    assert reasons["wrong"].startswith("wrong result: mean relative error")
    assert {refusal["tokens"] for refusal in written["refused"]} == {None, 4}
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in reasons.values())


def test_what_is_not_measured_is_said():
    peers = [load("bf16"), peer("slow", most_tokens=1), peer("rare", only_tokens=frozenset((2,)))]

    report = measure(peers, tokens=(1, 2, 4), layers=(NARROW,))

    found = [(result.peer, result.tokens) for result in report.results]
    assert found == [("bf16", 1), ("slow", 1), ("bf16", 2), ("rare", 2)]
    skipped = [(each["peer"], each["tokens"]) for each in report.not_measured]
    assert skipped == [("bf16", [4]), ("slow", [4]), ("slow", [2]), ("rare", [4]), ("rare", [1])]
    assert all(each["reason"].startswith("not measured: ") for each in report.not_measured)


def test_contestants_take_turns_where_calls_are_long():
    other = dataclasses.replace(load("bf16"), name="other")
    drifting = [timing.Times(us, us - 1, us + 1) for us in (300.0, 9.0, 500.0, 400.0)]

    report = measure([load("bf16"), other], timer=lambda *_: drifting.pop(0), tokens=(4,))

    first, second = report.results
    assert (first.us, first.us_least, first.us_greatest) == (400.0, 299.0, 501.0)
    assert (second.us, second.us_least, second.us_greatest) == (9.0, 8.0, 10.0)


def test_the_file_is_written_after_each_layer(tmp_path):
    output = tmp_path / "result.json"

    def interrupted(calls, replays, warm_up_us):
        if len(calls[0]()[0]) == NARROW.n:
            raise KeyboardInterrupt
        return timing.Times(1, 1, 1)

    with pytest.raises(KeyboardInterrupt):
        measure([load("bf16")], output, interrupted, layers=(SMALL, NARROW))

    written = json.loads(output.read_text())
    assert {row["layer"] for row in written["results"]} == {"small"}
    assert not written["complete"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    output = tmp_path / "result.json"
    output.write_text("before")
    report = Report({}, {}, {}, refused=[{"reason": float("nan")}])

    with pytest.raises(ValueError):
        report.write(output)

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert output.read_text() == "before"


def test_the_read_floor_is_timed_after_each_few_tokens(monkeypatch):
    words = dataclasses.make_dataclass("Words", ["nbytes"])
    words.check = words.read = lambda self: torch.zeros(1)
    words.copy = lambda self: self
    # Three ways to read, then the fastest after 1, 4 and 16 tokens.
    each = [timing.Times(us, us, us) for us in (9.0, 5.0, 7.0, 5.5, 5.4, 5.6)]
    monkeypatch.setattr("benchmarks.kernels.measure.packed_words", lambda *_: [words(1000)] * 3)

    report = measure([], timer=lambda *_: each.pop(0), tokens=(1, 4, 16, 17), names=("read_floor",))

    (floor,) = report.results
    assert (floor.peer, floor.tokens, floor.error) == ("read_floor", None, None)
    assert (floor.us, floor.us_least, floor.us_greatest) == (5.45, 5.0, 5.6)
    assert not each


def test_all_are_checked_before_any_is_timed():
    """Products in fp64 heat the GPU."""
    done = []

    class Recorder(FakeTimer):
        def __call__(self, *arguments):
            done.append("timed")
            return super().__call__(*arguments)

    def checked(name):
        def prepare(dense, group_size):
            weight = load("bf16").prepare(dense, group_size)
            exact = weight.exact
            object.__setattr__(weight, "exact", lambda: done.append("checked") or exact())
            return weight

        return Peer(name, prepare)

    measure([checked("one"), checked("two")], timer=Recorder(), tokens=(1,))

    assert done == ["checked", "checked", "timed", "timed"]


def test_prompts_are_timed_on_a_busy_gpu():
    timer = FakeTimer()
    measure([load("bf16"), peer("ours", 0.0)], timer=timer, tokens=(128, 256), layers=(SMALL,))
    few, busy = timing.WARM_UP_US, timing.BUSY_WARM_UP_US
    assert timer.warm_ups == [few, few, busy, busy]


def test_defaults_and_quick():
    options = parse_options([])
    assert [layer.name for layer in options.layers] == list(LAYERS)
    assert (options.peers, options.replays, options.group_size) == (NAMES, 9, 128)
    assert options.tokens[-1] == 8192 and not LAYERS["lm_head"].takes(256)
    quick = parse_options(["--quick", "--tokens", "8,2,8"])
    assert [layer.name for layer in quick.layers] == ["in_proj", "mlp_down"]
    assert (quick.tokens, quick.replays) == ((2, 8), 5)


def test_shapes_alone_or_beside_layers():
    alone = parse_options(["--shapes", "2832x4480,64x128"]).layers
    assert [(layer.name, layer.n, layer.k) for layer in alone] == [
        ("2832x4480", 2832, 4480),
        ("64x128", 64, 128),
    ]
    both = parse_options(["--shapes", "64x128", "--layers", "o_proj"]).layers
    assert [layer.name for layer in both] == ["o_proj", "64x128"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "in_proj,inproj"], "'inproj' is not a layer; choose from in_proj, out_proj"),
        (["--peers", "cutlass"], "'cutlass' is not a peer; choose from ours, bf16, marlin"),
        (["--shapes", "2832"], "'2832' is not a shape NxK such as 2832x4480"),
        (["--shapes", "0x4480"], "'0x4480' is not a shape NxK"),
        (["--tokens", "1,zero"], "'zero' is not a positive whole number"),
        (["--replays", "0"], "'0' is not a positive whole number"),
        (["--group-size", "48"], "choose from 32, 64, 128"),
        (["--output", "/no/such/folder/x.json"], "there is no folder '/no/such/folder'"),
        (["--output", "/"], "'/' is a folder, not a file"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    assert message in said(capsys, parse_options, *arguments)


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--quick"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_symmetric_weights_and_their_packing():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(16, 128, generator=generator, dtype=torch.bfloat16)

    weight = quantize_symmetric(dense, 32)

    # Uniform steps of at most 1 / 7 of each group's greatest value: half a step off at most, or
    # as much as bf16 rounds the scale down where a value is clamped.
    steps = weight.scale.double().repeat_interleave(32, dim=1)
    assert ((weight.exact() - dense.double()).abs() <= 0.55 * steps).all()
    assert weight.integers.min() == 0 and weight.integers.max() == 15
    words = pack_eight(weight.integers)
    assert words.shape == (16, 16) and words.dtype == torch.int32
    unpacked = torch.stack([(words >> 4 * place) & 15 for place in range(8)], dim=-1)
    assert torch.equal(unpacked.view(16, 128).to(torch.uint8), weight.integers)
    with pytest.raises(GroupRefused, match="K = 128 is not a multiple of the group size 48"):
        quantize_symmetric(dense, 48)


def test_relative_error_over_several_chunks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1100, 8, generator=generator)
    exact = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    expected = x.double() @ exact.t()
    # Every value half as much again: the mean distance is half the mean magnitude.
    assert relative_error((1.5 * expected).float(), x, exact) == pytest.approx(0.5, rel=1e-6)


def test_missing_packages_are_refusals():
    with pytest.raises(Refused, match="cannot import no_such_package"):
        importable("no_such_package")


def test_contestants_import_without_cuda_vllm_and_triton():
    others = [name for name in CONTESTANTS if name != "ours"]
    script = f"""
import sys
sys.modules |= dict.fromkeys(("vllm", "triton", "gemlite", "humming", "matplotlib"))
import benchmarks.kernels.table, benchmarks.kernels.plot
assert "torch" not in sys.modules
import benchmarks.kernels.run
from benchmarks.kernels.peers import load
for name in {others}:
    assert load(name).name == name
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--layers", "lm_head", "--tokens", "8192"],
        ["--peers", "gemlite", "--tokens", "3"],  # measured at a few numbers only
    ],
)
def test_a_selection_of_nothing_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing to measure" in line and arguments[-1] in line


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("search", ["--output", "/nope/x.json"], "there is no folder '/nope'"),
        ("search", ["--output", "x.json"], "no CUDA GPU"),
        ("mamba_states", ["--output", "/nope/x.json"], "there is no folder '/nope'"),
        ("mamba_states", ["--geometry", "/nope"], "'/nope' has no config.json; there are"),
        ("mamba_states", [], "no CUDA GPU"),
    ],
)
def test_scripts_of_a_gpu_say_what_is_wrong_without_vllm(script, arguments, message, tmp_path):
    if script == "mamba_states":
        arguments = ["--output", "x.json", "--folder", str(tmp_path / "tuned"), *arguments]
    command = f"""
import sys
import torch
sys.modules["vllm"] = None  # an import of it fails
torch.cuda.is_available = lambda: False
from benchmarks.kernels import {script}
sys.argv = ["{script}.py", *{arguments}]
{script}.main()
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "tuned").exists()
