# SPDX-License-Identifier: Apache-2.0
"""The shipped model, served as BF16 and by every preset, by real vLLM engines."""

import pytest

from .engines import METHOD, heldout_windows, job, perplexity, run_engines

pytestmark = [pytest.mark.compat, pytest.mark.slow]

# int4 modules of pattern M-M*-M-, qkv_proj counted once: 3 in_proj, 3 out_proj, 3 up_proj,
# 3 down_proj, qkv_proj and o_proj, lm_head. `quality` leaves layers 0, 1, 2 (feeds attention),
# 5 and 6: of seven layers only the MLP of layer 4 remains.
MODULES = {"ssm": 6, "balanced": 12, "quality": 2, "full": 15}
# Held-out perplexity over that of BF16. The project's goals for plain min-max are 1.05 for `ssm`
# and 1.10 for `balanced`; these are about twice what was measured (benchmarks/results).
LIMITS = {"ssm": 1.01, "balanced": 1.01, "quality": 1.01, "full": 1.025, "g32": 1.01, "g64": 1.01}


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    windows = heldout_windows(tiny_model)
    jobs = [job("bf16", tiny_model, windows=windows)]
    jobs += [job(preset, tiny_model, {"preset": preset}, windows=windows) for preset in MODULES]
    jobs += [job(f"g{g}", tiny_model, {"group_size": g}, windows=windows) for g in (32, 64)]
    jobs.append(job("reload", tiny_model, {"preset": "full"}, reload=True))
    jobs.append(job("dummy", tiny_model, {}, engine={"load_format": "dummy"}))
    jobs.append(job("half", tiny_model, {}, engine={"dtype": "float16"}))
    jobs.append(job("bf16 again", tiny_model))
    return run_engines(jobs, tmp_path_factory.mktemp("presets"))


@pytest.mark.parametrize("preset", MODULES)
def test_a_preset_quantizes_what_it_names(reports, preset):
    report = reports[preset]
    assert len(report["int4"]) == MODULES[preset], report
    line = f"quantized {MODULES[preset]} modules to int4 (preset {preset}, group size 128, minmax)"
    assert sum(line in text for text in report["log"]) == 1


@pytest.mark.parametrize("name", LIMITS)
def test_what_int4_costs_in_perplexity(reports, name):
    cost = perplexity(reports[name]) / perplexity(reports["bf16"])
    assert 0.99 < cost < LIMITS[name]


def test_int4_still_writes_like_the_model(reports):
    both = zip(reports["bf16"]["texts"], reports["balanced"]["texts"], strict=True)
    same = [exact.split()[:3] == int4.split()[:3] for exact, int4 in both]
    assert sum(same) >= 2, reports


def test_dummy_weights_load(reports):
    assert len(reports["dummy"]["int4"]) == MODULES["balanced"], reports["dummy"]


def test_reloaded_weights_are_quantized_again_to_the_same_bytes(reports):
    assert reports["reload"]["reload_keeps_every_byte"], reports["reload"]
    assert reports["reload"]["tokens"] == reports["full"]["tokens"]


def test_half_precision_is_refused_where_it_overflows(reports):
    assert "squared ReLU overflows float16" in reports["half"]["error"]
    assert "--dtype bfloat16" in reports["half"]["error"]


def test_other_models_in_the_process_notice_nothing(reports):
    assert reports["bf16 again"]["tokens"] == reports["bf16"]["tokens"]
    assert reports["bf16 again"]["int4"] == {}
    for name in ("bf16", "bf16 again"):
        assert not any(f"{METHOD}:" in line for line in reports[name]["log"])
