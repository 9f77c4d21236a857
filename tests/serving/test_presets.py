# SPDX-License-Identifier: Apache-2.0
"""The shipped model by real vLLM engines: as BF16, by every preset, and int4 in the checkpoint."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import reorder, write_int4

from .engines import METHOD, heldout_windows, job, perplexity, run_engines

pytestmark = [pytest.mark.compat, pytest.mark.slow]

# int4 modules of pattern M-M*-M-, qkv_proj counted once: 3 in_proj, 3 out_proj, 3 up_proj,
# 3 down_proj, qkv_proj and o_proj, lm_head. `quality` leaves layer 2, which feeds attention.
MODULES = {"ssm": 6, "balanced": 12, "quality": 10, "full": 15}
# Held-out perplexity over that of BF16. The project's goals for plain min-max are 1.05 for `ssm`
# and 1.10 for `balanced`; these are about twice what was measured (benchmarks/results).
LIMITS = {"ssm": 1.01, "balanced": 1.01, "quality": 1.01, "full": 1.025, "g32": 1.01, "g64": 1.01}
# Recipes of checkpoints that are int4 already, by the job that quantizes the same while loading.
STORED = {
    "ssm": {"preset": "ssm"},
    "balanced": {"preset": "balanced"},
    "full": {"preset": "full"},
    "g32": {"group_size": 32},
}


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    windows = heldout_windows(tiny_model)
    jobs = [job("bf16", tiny_model, windows=windows)]
    jobs += [
        job(
            preset,
            tiny_model,
            {"preset": preset},
            windows=windows,
            digests=True,
            reload=preset == "full",
        )
        for preset in MODULES
    ]
    jobs += [
        job(f"g{g}", tiny_model, {"group_size": g}, windows=windows, digests=True) for g in (32, 64)
    ]
    jobs.append(job("dummy", tiny_model, {}, engine={"load_format": "dummy"}))
    jobs.append(job("half", tiny_model, {}, engine={"dtype": "float16"}))
    jobs += stored_jobs(tiny_model, tmp_path_factory.mktemp("stored"))
    jobs.append(job("bf16 again", tiny_model))
    return run_engines(jobs, tmp_path_factory.mktemp("presets"))


def stored_jobs(tiny_model, folder):
    """Engines on checkpoints that are int4 already: with and without a flag, reloaded, dummies."""
    flags = {
        # Served as `vllm serve DIR`; the others say the same in other words.
        "full": {"reload": True},
        "ssm": {"engine": {"quantization": METHOD}},
        "g32": {"options": {"max_capture_size": 4}},
        "balanced": {"engine": {"hf_overrides": {"quantization_config": {"preset": "balanced"}}}},
    }
    jobs = []
    for name, recipe in STORED.items():
        model = write_int4(tiny_model, folder / name, **recipe)
        jobs.append(job(f"stored {name}", model, digests=True, **flags.get(name, {})))
    jobs.append(job("stored dummy", folder / "full", engine={"load_format": "dummy"}))
    ordered = write_int4(tiny_model, folder / "ordered", partial(order_columns, tiny_model))
    jobs.append(job("stored ordered", ordered, windows=heldout_windows(tiny_model)))
    return jobs


def order_columns(tiny_model, tensors):
    """Store the columns of every MLP in another order, as GPTQ does."""
    source = load_file(tiny_model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight_packed")]:
        module = name.removesuffix(".weight_packed")
        if module.endswith(("up_proj", "down_proj")):
            weight = source[f"{module}.weight"]
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(7))
            tensors = reorder(tensors, module, weight, 128, order)
    return tensors


@pytest.mark.parametrize("preset", MODULES)
def test_a_preset_quantizes_what_it_names(reports, preset):
    report = reports[preset]
    assert len(report["int4"]) == MODULES[preset], report
    line = f"quantized {MODULES[preset]} modules to int4 (preset {preset}, group size 128, mse)"
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
    assert reports["full"]["reload_keeps_every_byte"], reports["full"]


@pytest.mark.parametrize("name", STORED)
def test_an_int4_checkpoint_gives_the_bytes_of_quantizing_while_loading(reports, name):
    stored = reports[f"stored {name}"]
    assert "error" not in stored, stored
    assert stored["digests"] == reports[name]["digests"]
    assert len(stored["digests"][0]) > 40
    assert stored["tokens"] == reports[name]["tokens"]
    assert stored["int4"] == reports[name]["int4"]


def test_an_int4_checkpoint_is_loaded_and_not_quantized(reports):
    log = "\n".join(reports["stored full"]["log"])
    assert "loaded 15 int4 modules (preset full, group size 128, mse)" in log
    assert "modules to int4" not in log


def test_an_int4_checkpoint_can_be_reloaded(reports):
    assert reports["stored full"]["reload_keeps_every_byte"], reports["stored full"]


def test_an_int4_checkpoint_loads_dummies(reports):
    assert reports["stored dummy"]["int4"] == reports["full"]["int4"], reports["stored dummy"]
    assert all(len(tokens) == 24 for tokens in reports["stored dummy"]["tokens"])


def test_columns_in_another_order_cost_no_more_than_in_their_own(reports):
    assert "error" not in reports["stored ordered"], reports["stored ordered"]
    cost = perplexity(reports["stored ordered"]) / perplexity(reports["bf16"])
    assert 0.99 < cost < LIMITS["balanced"]


def test_half_precision_is_refused_where_it_overflows(reports):
    assert "squared ReLU overflows float16" in reports["half"]["error"]
    assert "--dtype bfloat16" in reports["half"]["error"]


def test_other_models_in_the_process_notice_nothing(reports):
    assert reports["bf16 again"]["tokens"] == reports["bf16"]["tokens"]
    assert reports["bf16 again"]["int4"] == {}
    for name in ("bf16", "bf16 again"):
        assert not any(f"{METHOD}:" in line for line in reports[name]["log"])
