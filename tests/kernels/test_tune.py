# SPDX-License-Identifier: Apache-2.0
"""What the tuner chooses from given times; the times themselves need a GPU."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from vllm_nanoquant.kernels import prefill, tune
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.settings import Gpu

H200 = Gpu((9, 0), 132)
# qkv_proj of Nemotron-Nano-9B-v2.
N, CHUNKS = 7168, 35

Run = Callable[[torch.Tensor, RuntimeWeight], torch.Tensor]


class GivenTimes:
    """A shape whose times are known: microseconds by tokens, for some cuts (warps_k, split)."""

    def __init__(self, by_cut: dict[tuple[int, int], dict[int, float]]) -> None:
        self.by_cut = by_cut

    def measure(self, tokens: int, run: Run, name: str) -> float:
        """The time of a cut, 1 % more the fewer tiles a warp has; infinite for other cuts."""
        found = re.search(r"warps_k=(\d+), split=(\d+).*?tiles=(\d+)", name)
        assert found
        warps_k, split, tiles = map(int, found.groups())
        times = self.by_cut.get((warps_k, split))
        return times[tokens] * (1.04 - 0.01 * tiles) if times else math.inf


def chosen(by_cut: dict[tuple[int, int], dict[int, float]]) -> dict[str, Any]:
    return tune.tune_decode(H200, cast(tune.Shape, GivenTimes(by_cut)), N, CHUNKS)


def test_a_gain_at_16_tokens_does_not_pay_for_a_loss_at_1_and_8() -> None:
    """Both cuts as measured on an H200 (h200-decode-trials.json): the first, in spite of 12.1."""
    entry = chosen({(4, 1): {1: 8.3, 8: 8.8, 16: 12.1}, (1, 7): {1: 9.0, 8: 9.7, 16: 9.8}})
    assert (entry["warps_k"], entry["split"]) == (4, 1)
    entry = chosen({(4, 1): {1: 8.3, 8: 8.8, 16: 12.1}, (1, 7): {1: 8.4, 8: 8.9, 16: 9.8}})
    assert (entry["warps_k"], entry["split"]) == (1, 7)


def test_each_number_of_tokens_gets_its_own_launch() -> None:
    entry = chosen({(4, 1): {1: 8.3, 8: 8.8, 16: 12.1}})
    assert entry["up_to_8"]["tiles"] == entry["up_to_16"]["tiles"] == 4


def test_registers_let_a_multiprocessor_hold_its_share() -> None:
    """980 programs of 64 threads: 8 for some, which 128 registers allow and 144 do not."""
    launches = tune.decode_launches(H200, 4480, (2, 7), {(2, 2): (104, 144)})
    assert [each.registers for each in launches] == [128, 144]
    # 22 programs of a warp each would leave 88 registers, too few.
    launches = tune.decode_launches(H200, 22656, (1, 4), {(2, 2): (104, 144)})
    assert [each.registers for each in launches] == [144]


def test_registers_are_counted_by_quarters_of_a_multiprocessor() -> None:
    """14 warps: 4 for two of the quarters, which 128 registers allow, not 65536 / (32 * 14)."""
    launches = tune.decode_launches(H200, 4480, (1, 13), {(2, 2): (104, 144)})
    assert [each.registers for each in launches] == [128, 144]


@pytest.mark.parametrize(("n", "chunks"), [(1, 1), (256, 4), (4480, 123), (131072, 35)])
def test_there_is_a_candidate_for_any_shape(n: int, chunks: int) -> None:
    cuts = tune.decode_candidates(H200, n, chunks)
    assert cuts
    for warps_k, split in cuts:
        per_split = -(-chunks // (warps_k * split)) * warps_k
        assert (split - 1) * per_split < chunks <= split * per_split


def test_close_times_are_measured_again() -> None:
    """One lucky time does not win, and what is far behind is not measured twice."""
    times = {"lucky": [9.8, 10.4, 10.5], "steady": [10.0, 10.0, 10.1], "slow": [12.0]}
    given = {name: iter(each) for name, each in times.items()}
    assert tune.fastest(given, lambda name: next(given[name])) == (10.0, "steady")


def test_candidates_that_all_fail_are_not_tried_again() -> None:
    tried: list[str] = []

    def measure(name: str) -> float:
        tried.append(name)
        return math.inf

    assert tune.fastest(["one", "two"], measure)[0] == math.inf
    assert tried == ["one", "two"]


@pytest.mark.parametrize("text", ["4096", "4096x", "4096x0", "axb", "1x2x3", ""])
def test_a_wrong_shape_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        tune.parse_shapes(f"22656x4480,{text}")


def test_shapes_are_rows_by_columns() -> None:
    assert tune.parse_shapes("22656x4480,16X32") == [(22656, 4480), (16, 32)]


def test_what_could_not_be_run_gets_no_entry() -> None:
    """Settings that nothing could run would fail while serving; the rule may not."""
    assert tune.tune_decode(H200, cast(tune.Shape, GivenTimes({})), N, CHUNKS) is None

    class OnlyPrefill:
        def measure(self, tokens: int, run: Run, name: str) -> float:
            return 10.0 if name == "prefill" else math.inf

    assert tune.tune_fused(H200, cast(tune.Shape, OnlyPrefill())) == []


def test_a_wrong_first_candidate_does_not_leave_out_the_right_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "prefill", lambda x, weight, bias: x + 1)
    shape = object.__new__(tune.Shape)
    shape.copies, shape.expected = [cast(RuntimeWeight, None)], {}
    x = torch.ones(3, 4)
    assert shape._error(x + 5, x) == 2.0
    assert math.isnan(shape._error(x * math.nan, x))
    assert shape._error(x + 1, x) == 0.0


SHIPPED = Path(tune.__file__).with_name("tuning") / "sm90.json"


@pytest.fixture
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune, "gpu_of", lambda device: H200)


@pytest.mark.usefixtures("on_an_h200")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output {tmp}/none/sm90.json", "there is no folder"),
        ("--output {tmp}/sm86.json", "settings for this GPU are looked for in sm90.json"),
        ("--output {tmp}", "settings for this GPU are looked for in sm90.json"),
        ("--output {tmp}/sm90.json --jobs 0", "--jobs 0: at least 1"),
        ("--output {tmp}/sm90.json --shapes 4x", "'4x' is not a shape"),
        ("--output {tmp}/broken/sm90.json", "sm90.json is no table of kernel settings"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_compiled(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken" / "sm90.json"
    broken.parent.mkdir()
    broken.write_text("{", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["tune", *arguments.format(tmp=tmp_path).split()])
    with pytest.raises(SystemExit):
        tune.main()
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("on_an_h200")
def test_shapes_that_a_file_has_from_such_a_gpu_stay(tmp_path: Path) -> None:
    path = tmp_path / "sm90.json"
    assert tune.table_to_extend(path, H200)["shapes"] == {}
    measured = json.loads(SHIPPED.read_text(encoding="utf-8"))
    path.write_text(json.dumps(measured), encoding="utf-8")
    assert tune.table_to_extend(path, H200)["shapes"] == measured["shapes"]
    path.write_text(json.dumps(measured | {"multiprocessors": 114}), encoding="utf-8")
    assert tune.table_to_extend(path, H200)["shapes"] == {}
