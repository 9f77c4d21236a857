# SPDX-License-Identifier: Apache-2.0
"""A loaded BF16 model that becomes int4 in place on a GPU, eager and with CUDA graphs."""

import re

import pytest

from tests.dequantized import write_dequantized

from .patched_engines import (
    mean_relative_error,
    patched_job,
    run_patched,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FULL = ["llm", {"preset": "full"}]
OUR_KERNELS = {"decode_kernel", "arrange_kernel", "fused_kernel", "dequantize_kernel"}


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patch")
    # Small: engines in one process may leave memory behind.
    gpu = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 2 << 30}
    graphs = gpu | {"enforce_eager": False}
    full = {"preset": "full"}
    jobs = [
        patched_job("eager", tiny_model, [["model", full], FULL], engine=dict(gpu)),
        patched_job("eager loaded", tiny_model, options=full, engine=dict(gpu)),
        patched_job("graphs", tiny_model, [FULL, FULL], engine=dict(graphs)),
        patched_job("graphs loaded", tiny_model, options=full, engine=dict(graphs)),
        patched_job(
            "dequantized", write_dequantized(tiny_model, folder / "model"), engine=dict(gpu)
        ),
    ]
    return run_patched(jobs, folder / "engines")


def test_the_tokens_are_those_of_an_engine_that_loaded_int4(reports):
    assert reports["eager"]["tokens"] == reports["eager loaded"]["tokens"]
    assert reports["eager"]["tokens"] != reports["eager"]["before"]


def test_with_graphs_the_logits_are_those_of_an_engine_that_loaded_int4(reports):
    """Up to where two texts part, which rounding can bring about: what vLLM compiled for the BF16
    model is gone, but its sizes of graphs are not, and from 17 tokens on the last bits depend on
    their number."""
    found, expected = reports["graphs"], reports["graphs loaded"]
    same = [
        next((at for at, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(found["tokens"], expected["tokens"], strict=True)
    ]
    print(f"tokens before texts part: {same}")
    assert min(same) > 0
    for prompt, length in enumerate(same):
        upto = slice(0, length + 1)
        ours, theirs = (each["logits"][prompt, upto] for each in (found, expected))
        assert mean_relative_error(ours, theirs) < 1e-2
    assert found["tokens"] != found["before"]


def test_eager_logits_are_those_of_an_engine_that_loaded_int4(reports):
    assert reports["eager"]["logits"].equal(reports["eager loaded"]["logits"])


@pytest.mark.parametrize("name", ["eager", "graphs"])
def test_the_first_logits_are_those_of_a_bf16_model_with_the_dequantized_weights(reports, name):
    # Of the token after each prompt, before texts can part.
    found, expected = (reports[which]["logits"][:, 0] for which in (name, "dequantized"))
    assert mean_relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("name", ["eager", "graphs"])
def test_memory_is_freed_and_a_second_patch_does_nothing(reports, name):
    first, second = reports[name]["patches"]
    assert len(first["modules"]) == 15
    assert first["bytes_before"] > first["bytes_freed"] > 0
    assert second["modules"] == [] and second["bytes_freed"] == 0


def test_graphs_are_captured_twice_and_only_where_there_are_any(reports):
    assert reports["graphs"]["patches"][0]["compiled_again"]
    assert not reports["graphs"]["patches"][1]["compiled_again"]
    assert not reports["eager"]["patches"][0]["compiled_again"]
    # vLLM's counter begins anew when the model is compiled anew.
    assert reports["graphs"]["graphs"] > 0


def test_none_of_our_kernels_is_compiled_while_serving(reports):
    log = "\n".join(reports["graphs"]["log"])
    late = set(re.findall(r"kernel JIT compilation during inference: (\w+)", log))
    assert not late & OUR_KERNELS
