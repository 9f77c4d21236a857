# SPDX-License-Identifier: Apache-2.0
"""The tuner of vLLM's update of Mamba states, without a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from vllm.model_executor.layers.mamba.ops import mamba_ssm

from benchmarks.kernels import mamba_states
from benchmarks.kernels.mamba_states import Heads, Update
from vllm_nanoquant.kernels.timing import Times

SMALL = Heads(heads=4, size=24, state=16, groups=2)


@pytest.fixture
def update(monkeypatch):
    monkeypatch.setattr(mamba_states, "copies_needed", lambda nbytes: 3)
    return Update(SMALL, 2, torch.device("cpu"))


def test_sizes_of_a_geometry():
    folder = mamba_states.ROOT / "benchmarks" / "geometry" / "nemotron-nano-9b-v2"
    assert Heads.of(folder) == Heads(heads=128, size=80, state=128, groups=8)


def test_every_call_has_states_of_its_own(update):
    slots = update.slots.flatten().tolist()
    assert sorted(slots) == list(range(1, len(update.states)))
    assert len(slots) == len(set(slots)) == update.calls * 2


def test_the_expected_output_by_the_recurrence(update):
    sequence, head, row = 1, 3, 7
    slot = int(update.slots[2, sequence, 0])
    dt = torch.nn.functional.softplus(
        update.dt[sequence, head, row] + update.bias[head, row].double()
    )
    x = update.x[sequence, head, row].double()
    group = head // 2
    decay = torch.exp(update.a[head, row, 0].double() * dt)
    state = update.states[slot, head, row].double() * decay
    state += dt * x * update.b[sequence, group].double()
    expected = state @ update.c[sequence, group].double() + update.d[head, row].double() * x
    torch.testing.assert_close(update.expected(2)[sequence, head, row], expected)


def test_vllms_own_comes_first_and_close_ones_are_timed_twice(update, monkeypatch):
    # vLLM's own is slow, (4, 1) is fastest, and 4 rows with 2 warps are within 5 % of it.
    times = {(4, 1): 10.0, (4, 2): 10.4, (32, 4): 30.0}
    used = []

    def time(calls, replays):
        used.append(mamba_ssm._ssm_config_override)
        return Times(times.get(used[-1], 20.0), 1.0, 99.0)

    monkeypatch.setattr(mamba_states, "time_in_graph", time)
    monkeypatch.setattr(Update, "error", lambda self: 0.0)
    found = mamba_states.time_settings(update)
    assert (found[0]["rows"], found[0]["warps"]) == mamba_states.vllms_own(update) == (32, 4)
    assert len({(each["rows"], each["warps"]) for each in found}) == len(found)
    again = {(each["rows"], each["warps"]) for each in found if "us_again" in each}
    assert again == {(32, 4), (4, 1), (4, 2)}
    assert min(found, key=mamba_states.cost) == found[1]
    # No more rows than twice a head's.
    assert max(each["rows"] for each in found) == 32


def test_the_file_has_vllms_name_and_keys(tmp_path, monkeypatch, capsys):
    def results(rows, warps, us):
        return {"rows": rows, "warps": warps, "us": {"median": us}, "error": 1e-3}

    found = [results(4, 4, 28.0), results(4, 1, 23.0)]
    monkeypatch.setattr(mamba_states, "tune", lambda heads, device: iter([(8, 84_000, found)]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_states, "describe_device", lambda device: {"name": "GPU"})
    monkeypatch.setattr(mamba_ssm, "get_ssm_device_name", lambda: "NVIDIA_H200")
    output, folder = tmp_path / "all.json", tmp_path / "tuned"
    monkeypatch.setattr("sys.argv", ["x", "--output", str(output), "--folder", str(folder)])
    mamba_states.main()
    assert json.loads(output.read_text())["results"][0]["settings"] == found
    (file,) = folder.iterdir()
    recorded = mamba_states.ROOT / "benchmarks" / "mamba_states"
    assert file.name in {each.name for each in recorded.iterdir()}
    # Keyed by sequences x heads.
    assert json.loads(file.read_text()) == {"1024": {"BLOCK_SIZE_M": 4, "num_warps": 1}}
    assert "best 4 rows, 1 warps: 23.00 us" in capsys.readouterr().out


def test_the_recorded_file_follows_from_the_recorded_times():
    root = mamba_states.ROOT / "benchmarks"
    report = json.loads((root / "kernels" / "results" / "h200-mamba-states.json").read_text())
    (file,) = (root / "mamba_states").iterdir()
    best = {
        str(each["batch"] * report["problem"]["heads"]): min(
            each["settings"], key=mamba_states.cost
        )
        for each in report["results"]
    }
    assert json.loads(file.read_text()) == {
        key: {"BLOCK_SIZE_M": each["rows"], "num_warps": each["warps"]}
        for key, each in best.items()
    }


def test_a_config_of_another_family_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = ["--output", str(tmp_path / "x.json"), "--folder", str(tmp_path / "tuned")]
    monkeypatch.setattr("sys.argv", ["x", *options, "--geometry", str(tmp_path)])
    with pytest.raises(SystemExit):
        mamba_states.main()
    assert "is not a Nemotron-H's: no 'mamba_num_heads'" in capsys.readouterr().err
