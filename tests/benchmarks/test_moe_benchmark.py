# SPDX-License-Identifier: Apache-2.0
"""The table of the experts' benchmark, what a decode step reads, the contestants' arithmetic."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.end_to_end import traffic
from benchmarks.kernels import moe, moe_peers, moe_table
from benchmarks.kernels.moe_peers import Experts

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


def test_our_contestant_is_right_and_errors_are_seen(monkeypatch):
    for name, value in {"EXPERTS": 4, "TOP_K": 2, "HIDDEN": 128, "INTERMEDIATE": 64}.items():
        monkeypatch.setattr(moe, name, value)
    torch.manual_seed(0)
    experts = moe.random_experts(torch.device("cpu"))
    ours = moe_peers.ours(experts)
    route = moe.random_route(3, False, torch.device("cpu"))
    assert moe.relative_error(ours, route) <= 8e-3
    other = moe_peers.ours(Experts(experts.w13 * 1.1, experts.w2))
    wrong = moe_peers.Contestant(other.call, ours.exact, 128, 0)
    assert moe.relative_error(wrong, route) > 0.1


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
