# SPDX-License-Identifier: Apache-2.0
"""The shipped model on a GPU: Triton kernels, torch.compile and CUDA graphs, by real vLLM."""

import re

import pytest

from tests.checkpoints import write_int4

from .engines import heldout_windows, job, perplexity, run_engines

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

OUR_KERNELS = {"decode_kernel", "arrange_kernel", "fused_kernel", "dequantize_kernel"}


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    windows = heldout_windows(tiny_model)
    engine = {
        "enforce_eager": False,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 2 << 30,
    }
    jobs = [job("bf16", tiny_model, windows=windows, engine=dict(engine))]
    jobs.append(job("full", tiny_model, {"preset": "full"}, windows=windows, engine=dict(engine)))
    int4 = write_int4(tiny_model, tmp_path_factory.mktemp("int4") / "full", preset="full")
    jobs.append(job("stored", int4, engine=dict(engine)))
    environment = {"NANOQUANT_TEST_MULTIPROCESS": "1"}
    return run_engines(jobs, tmp_path_factory.mktemp("gpu"), environment, timeout=900)


def test_int4_serves_with_graphs_of_up_to_eight_tokens(reports):
    log = "\n".join(reports["full"]["log"])
    assert "quantized 15 modules to int4 (preset full" in log
    # 1, 2, 4 and 8 tokens; eight sequences alone would have vLLM capture 16 as well.
    assert re.search(r"Capturing CUDA graphs.*PIECEWISE.*4/4", log)
    assert re.search(r"Capturing CUDA graphs.*PIECEWISE.*5/5", "\n".join(reports["bf16"]["log"]))
    assert all(reports["full"]["texts"])


def test_int4_costs_on_the_gpu_what_it_costs_on_the_cpu(reports):
    assert 0.99 < perplexity(reports["full"]) / perplexity(reports["bf16"]) < 1.025


def test_an_int4_checkpoint_gives_the_tokens_of_quantizing_while_loading(reports):
    assert "loaded 15 int4 modules (preset full" in "\n".join(reports["stored"]["log"])
    assert reports["stored"]["tokens"] == reports["full"]["tokens"]


def test_none_of_our_kernels_is_compiled_while_serving(reports):
    log = "\n".join(reports["full"]["log"])
    assert "JIT monitor activated" in log
    late = set(re.findall(r"kernel JIT compilation during inference: (\w+)", log))
    assert not late & OUR_KERNELS
