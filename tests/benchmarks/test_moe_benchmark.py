# SPDX-License-Identifier: Apache-2.0
"""The table of the experts' benchmark, what a decode step reads, the contestants' arithmetic."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.end_to_end import traffic
from benchmarks.kernels import moe, moe_peers, moe_table
from benchmarks.kernels.peers.base import Refused
from vllm_nanoquant.kernels.timing import Times

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "kernels" / "results" / "h200-moe.json"
GEOMETRY = ROOT / "benchmarks" / "geometry"


def test_the_page_has_the_figures_of_the_result_file(capsys):
    assert moe_table.main([str(RESULT), "--check", str(ROOT / "docs" / "benchmarks.md")]) == 0


def test_the_table_marks_the_fastest():
    times = {("ours", 1): 19.3, ("bf16", 1): 42.6, ("ours", 2): 50.0, ("bf16", 2): 44.4}
    report = {
        "problem": {"experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32},
        "device": {"name": "GPU"},
        "packages": {"torch": "1", "triton": "2", "vllm": "3"},
        "results": [
            {"peer": peer, "tokens": tokens, "routes": "random", "us": us, "error": 1e-3}
            for (peer, tokens), us in times.items()
        ],
    }
    text = moe_table.tables(report | {"results": report["results"] + []})
    assert "| ours | **19** | 50 | 1.0e-03 |" in text
    assert "| BF16 (vLLM's Triton) | 43 | **44** | 1.0e-03 |" in text


CPU = torch.device("cpu")


@pytest.fixture
def experts(monkeypatch):
    """Small ones, and no GPU's timer."""
    sizes = {"EXPERTS": 4, "TOP_K": 2, "HIDDEN": 128, "INTERMEDIATE": 64, "TOKENS": (1, 3)}
    for name, value in sizes.items():
        monkeypatch.setattr(moe, name, value)

    def time_in_graph(calls, replays):
        calls[0]()
        return Times(2.0, 1.0, 3.0)

    monkeypatch.setattr(moe, "time_in_graph", time_in_graph)
    torch.manual_seed(0)
    return moe.random_experts(CPU)


def test_the_expected_result_token_by_token(experts):
    ours = moe_peers.ours(experts)
    x, weights, ids = route = moe.random_route(3, False, CPU)
    expected = torch.zeros(3, 128, dtype=torch.float64)
    for token in range(3):
        for slot, expert in enumerate(ids[token].tolist()):
            w13, w2 = ours.exact(expert)
            h = (w13 @ x[token].double()).clamp(min=0) ** 2
            expected[token] += weights[token, slot].double() * (w2 @ h)
    torch.testing.assert_close(moe.exact_result(ours, route), expected)


def test_our_contestant_is_right_and_errors_are_refused(experts):
    ours = moe_peers.ours(experts)
    route = moe.random_route(8, False, CPU)
    assert moe.checked_error(ours, route) <= 8e-3

    def wrong(change):
        def call(*route):
            y = ours.call(*route)
            change(y)
            return y

        return moe_peers.Contestant(call, ours.exact, 128, 0)

    # Of the last token alone: more than the first few are looked at.
    for change in (lambda y: y[-1].mul_(3), lambda y: y[-1, -1:].fill_(torch.nan)):
        with pytest.raises(Refused, match="wrong result: mean relative error"):
            moe.checked_error(wrong(change), route)
    short = moe_peers.Contestant(lambda *route: ours.call(*route)[:1], ours.exact, 128, 0)
    with pytest.raises(Refused, match="wrong result: shape"):
        moe.checked_error(short, route)


def test_a_result_that_is_not_written_is_seen(experts, monkeypatch):
    """The memory that a call gets is full of NaN."""
    poisoned = []
    monkeypatch.setattr(moe, "poison", lambda x, n: poisoned.append((*x.shape, n)))
    moe.checked_error(moe_peers.ours(experts), moe.random_route(3, False, CPU))
    assert poisoned == [(3, 128, 128)]


def test_what_fails_costs_the_others_nothing(experts, monkeypatch, tmp_path):
    def failing_at_three(experts):
        ours = moe_peers.ours(experts)

        def call(x, weights, ids):
            if len(x) == 3:
                raise RuntimeError("illegal address\nmore")
            return ours.call(x, weights, ids)

        return moe_peers.Contestant(call, ours.exact, 128, 0)

    output = tmp_path / "found.json"

    def interrupted(experts):
        assert not json.loads(output.read_text())["complete"]
        raise KeyboardInterrupt

    def absent(experts):
        raise OSError("no such library")

    contestants = {"bf16": absent, "marlin": failing_at_three, "ours": moe_peers.ours}
    monkeypatch.setattr(moe, "CONTESTANTS", contestants)
    names = list(contestants)
    moe.benchmark(names, CPU, {"problem": {}}, output)
    found = json.loads(output.read_text())
    assert found["complete"] and found["problem"] == {}
    rows = [(row["peer"], row["routes"], row["tokens"]) for row in found["results"]]
    ours = [("ours", "random", 1), ("ours", "random", 3), ("ours", "popular", 3)]
    assert rows == [("marlin", "random", 1), *ours]
    reason = "RuntimeError: illegal address"
    assert found["refused"] == [
        {"peer": "bf16", "reason": "OSError: no such library"},
        {"peer": "marlin", "routes": "random", "tokens": 3, "reason": reason},
        {"peer": "marlin", "routes": "popular", "tokens": 3, "reason": reason},
    ]

    contestants["ours"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        moe.benchmark(names, CPU, {}, output)
    found = json.loads(output.read_text())
    assert not found["complete"] and len(found["results"]) == 1
    problem = {"experts": 4, "top_k": 2, "hidden": 64, "intermediate": 32}
    packages = {"torch": "1", "triton": "2", "vllm": "3"}
    text = moe_table.tables(
        found | {"problem": problem, "device": {"name": "GPU"}, "packages": packages}
    )
    assert "The run did not come to its end." in text
    assert "int4 (vLLM's Marlin), random routes, 3 tokens: RuntimeError: illegal" in text


def test_a_figure_that_is_missing_is_a_dash():
    rows = [
        {"peer": peer, "tokens": tokens, "us": 10.0, "error": 1e-3}
        for peer, tokens in (("ours", 1), ("ours", 2), ("bf16", 2))
    ]
    assert "| BF16 (vLLM's Triton) | - | **10** | 1.0e-03 |" in moe_table._table(rows)


def test_popular_routes_are_the_same_for_all_tokens():
    _, _, ids = moe.random_route(5, True, torch.device("cpu"))
    assert (ids == ids[0]).all() and len(set(ids[0].tolist())) == moe.TOP_K


@pytest.mark.parametrize("preset", ["bf16", "balanced", "full"])
def test_bytes_of_a_token(preset):
    """By hand, from the sizes of Nemotron 3 Nano 30B-A3B."""
    config = json.loads((GEOMETRY / "nemotron-3-nano-30b-a3b" / "config.json").read_text())
    found = traffic.bytes_per_token(config, preset)
    per_weight = 2 if preset == "bf16" else 0.5 + 4 / 128
    assert found["experts"] == pytest.approx(23 * 6 * 2 * 1856 * 2688 * per_weight)
    assert found["Mamba states"] == 23 * 64 * 64 * 128 * 4 * 2
    in_proj, out_proj = (2 * 4096 + 2 * 8 * 128 + 64) * 2688, 2688 * 4096
    int4 = 23 * (in_proj + out_proj + 2 * 3712 * 2688)
    if preset == "full":
        int4 += 6 * (4096 + 2 * 256 + 4096) * 2688 + 131072 * 2688
    if preset != "bf16":
        assert found["other int4"] == pytest.approx(int4 * per_weight)


def test_the_share_of_a_step_is_printed(capsys):
    folder = str(GEOMETRY / "nemotron-nano-9b-v2")
    assert traffic.main([folder, "--preset", "full", "--tokens-per-second", "397"]) == 0
    assert "of 2.52 ms" in capsys.readouterr().out
