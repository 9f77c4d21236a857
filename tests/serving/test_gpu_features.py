# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM with int4 weights, on a GPU, against a BF16 model of the same weights.

Engines are started when a test asks for them. Where one of ours fails, the same is tried with the
BF16 model, so that the error says whether int4 has a part in it. The table is in docs/features.md.
"""

import json
import re
from contextlib import contextmanager

import pytest
import torch

from tests.dequantized import write_dequantized

from .features import (
    RANK,
    Answers,
    Lab,
    ask,
    assert_agree,
    engines_at_once,
    feature_job,
    prompts,
    write_adapter,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LIMIT = 1e-2
SECONDS = 100  # for an engine, its start included
GRAPHS = {"enforce_eager": False}
CACHE = 2 << 30
# Graphs for as many tokens as one sequence with its drafts has: more than the cap of 8 has for all.
DRAFTS = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def lab(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    bf16 = write_dequantized(tiny_model, folder / "bf16")
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({"preset": "full"}))
    groups = make_groups(tiny_model, bf16, write_adapter(tiny_model, folder / "adapter"), recipe)
    # Whatever int4 jobs do, the BF16 model can do alone.
    groups += [[alone(job, bf16)] for group in groups for job in group if is_int4(job)]
    environment = {"VLLM_CACHE_ROOT": str(folder / "cache")}
    laboratory = Lab(folder, groups, SECONDS, environment)
    laboratory.recipe = recipe
    ahead = ["bf16", "eager", "sleep", "prefix", "prefix without int4", "drafts", "graphs"]
    laboratory.run_ahead(ahead, engines_at_once())
    return laboratory


def sleeping_cache():
    """Bytes of a cache so large that it is seen to go, whatever other engines do meanwhile."""
    _, memory = torch.cuda.mem_get_info()
    return memory // 4


def make_groups(model, bf16, adapter, recipe):
    short, long = prompts(model).values()
    plain, brief = [ask("plain", short + long)], [ask("plain", short)]
    reload = [{"digest": "before"}, *plain, {"reload": True}, {"digest": "after"}]
    nap = [{"digest": "before"}, *brief, {"sleep": 1}, {"digest": "after 1"}, ask("after 1", short)]
    nap += [{"sleep": 2}, {"digest": "after 2"}, ask("after 2", short)]
    twice = [ask("first", long), ask("again", long)]
    mixed = [ask("mixed", short, adapters=[str(adapter), None, str(adapter)])]
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
    fp8 = {"kv_cache_dtype": "fp8"}
    cached = {"enable_prefix_caching": True, "max_num_batched_tokens": 512, **GRAPHS}
    by_file = {"hf_overrides": {"quantization_config_file": str(recipe)}, **GRAPHS}

    def job(name, steps, quantized=True, **engine):
        # The size is given, since vLLM cannot find it where other engines come and go.
        settings = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": CACHE, **engine}
        return feature_job(name, model if quantized else bf16, steps, quantized, **settings)

    return [
        [
            job("bf16", [*plain, ask("forty", short, tokens=40)], quantized=False),
            job("bf16 fp8 cache", brief, quantized=False, **fp8),
            job("bf16 adapter", mixed, quantized=False, **lora),
        ],
        [
            job("eager", [*reload, ask("reloaded", short + long)]),
            job("chunked", plain, max_num_batched_tokens=64),
            job("states", brief, mamba_ssm_cache_dtype="bfloat16"),
            job("fp8 cache", brief, **fp8),
            job("adapter", mixed, **lora),
        ],
        # vLLM allows one engine that sleeps in a process.
        [
            job(
                "sleep",
                nap,
                enable_sleep_mode=True,
                kv_cache_memory_bytes=sleeping_cache(),
                **GRAPHS,
            )
        ],
        [job("prefix", twice, **cached)],
        [
            job(
                "drafts",
                [ask("plain", short, 40, logits=False)],
                speculative_config=DRAFTS,
                **GRAPHS,
            )
        ],
        # Compiled artefacts are looked for when a process compiles for the first time.
        [job("graphs", brief, **by_file)],
        [job("same", brief, **by_file)],
        [job("changed", brief, **by_file)],
    ]


def is_int4(job):
    return "quantization" in job["engine"]


def alone(job, bf16):
    """The same job for the BF16 model, without us."""
    ours = {"model": str(bf16), "quantization": None, "hf_overrides": {}}
    return {**job, "name": f"{job['name']} without int4", "engine": {**job["engine"], **ours}}


def report_of(lab, name):
    """Report of an int4 job that did not fail."""
    with verdict(lambda: lab.report(f"{name} without int4")):
        return lab.report(name)


def assert_like(lab, name, label, oracle):
    """Assert that a job's answers are the oracle's."""
    report_of(lab, name)
    with verdict(lambda: assert_agree(lab.answers(f"{name} without int4", label), oracle, LIMIT)):
        assert_agree(lab.answers(name, label), oracle, LIMIT)


@contextmanager
def verdict(control):
    """Say, where a check fails, whether the same fails for the BF16 model, which `control` does."""
    try:
        yield
    except AssertionError as error:
        try:
            control()
            found = "The BF16 model does the same and passes."
        except AssertionError as other:
            found = f"The BF16 model fails too: {str(other)[:500]}"
        raise AssertionError(f"{error}\n{found}") from None


def oracle(lab, prompts=slice(None)):
    """The BF16 model's answers to some of the prompts; the first three are short."""
    tokens, logits = lab.answers("bf16", "plain")
    return Answers(tokens[prompts], logits[prompts])


SHORT, LONG = slice(3), slice(3, None)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("eager", slice(None)),
        ("chunked", slice(None)),
        ("states", SHORT),
        ("fp8 cache", SHORT),
        ("graphs", SHORT),
    ],
)
def test_logits_are_those_of_the_dequantized_weights(lab, name, asked):
    assert_like(lab, name, "plain", oracle(lab, asked))


def test_reloading_changes_no_byte_and_no_token(lab):
    report = report_of(lab, "eager")
    assert report["digests"]["after"] == report["digests"]["before"]
    assert report["answers"]["reloaded"] == report["answers"]["plain"]


def test_a_cached_prefix_gives_the_logits_of_a_fresh_one(lab):
    for label in ("first", "again"):
        assert_like(lab, "prefix", label, oracle(lab, LONG))
    hits, expected = (
        lab.report(name)["counters"]["vllm:prefix_cache_hits"]
        for name in ("prefix", "prefix without int4")
    )
    print(f"tokens found in the cache: {hits}, with BF16 weights {expected}")
    assert hits == expected


def test_speculative_decoding_changes_no_token(lab):
    assert_like(lab, "drafts", "plain", lab.answers("bf16", "forty"))
    counters = report_of(lab, "drafts")["counters"]
    taken = counters["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < taken < counters["vllm:spec_decode_num_draft_tokens"]


def test_speculative_decoding_has_graphs(lab):
    sizes = re.findall(r"'cudagraph_capture_sizes': (\[[^]]*\])", report_of(lab, "drafts")["log"])
    assert sizes[0] == "[9, 18, 36, 72]"


def test_an_fp8_cache_costs_what_it_costs_bf16(lab):
    assert_like(lab, "fp8 cache", "plain", lab.answers("bf16 fp8 cache", "plain"))


def test_an_adapter_on_int4_is_an_adapter_on_the_dequantized_weights(lab):
    assert_like(lab, "adapter", "mixed", lab.answers("bf16 adapter", "mixed"))
    plain = oracle(lab, SHORT).tokens
    assert lab.answers("adapter", "mixed").tokens[0] != plain[0]


def test_beside_an_adapter_a_prompt_without_one_is_answered_as_ever(lab):
    def second(name):
        tokens, logits = lab.answers(name, "mixed")
        return Answers(tokens[1:2], logits[1:2])

    expected = oracle(lab, slice(1, 2))
    report_of(lab, "adapter")
    with verdict(lambda: assert_agree(second("bf16 adapter"), expected, LIMIT)):
        assert_agree(second("adapter"), expected, LIMIT)


def test_rounded_states_are_named_once(lab):
    log = report_of(lab, "states")["log"]
    assert log.count("mamba_ssm_cache_dtype is bfloat16. The state of a Mamba layer") == 1


def test_compiled_artefacts_are_used_again_for_the_same_recipe_alone(lab):
    """The recipe is in a file, of which vLLM hashes the name."""
    loaded = "Directly load (AOT compilation|the compiled graph)"
    assert not re.search(loaded, report_of(lab, "graphs")["log"])
    before = artefacts(lab)
    same = report_of(lab, "same")
    assert re.search(loaded, same["log"])
    assert artefacts(lab) == before
    assert same["answers"] == lab.report("graphs")["answers"]
    lab.recipe.write_text(json.dumps({"preset": "balanced"}))
    changed = report_of(lab, "changed")
    assert "preset balanced" in changed["log"]
    assert not re.search(loaded, changed["log"])
    assert artefacts(lab) > before


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(lab, level):
    """After level 2 the weights are reloaded. The engine's graphs hold the addresses."""
    report = report_of(lab, "sleep")
    assert_like(lab, "sleep", "plain", oracle(lab, SHORT))
    assert_like(lab, "sleep", f"after {level}", oracle(lab, SHORT))
    assert report["digests"][f"after {level}"] == report["digests"]["before"]
    assert report["answers"][f"after {level}"] == report["answers"]["plain"]
    awake, asleep = report["memory"][2 * level - 2 : 2 * level]
    assert awake - asleep > sleeping_cache() // 2


def artefacts(lab):
    """Folders of compiled artefacts; each is named by a hash of all that they depend on."""
    root = lab.folder / "cache" / "torch_compile_cache"
    return {path.name for pattern in ("*", "torch_aot_compile/*") for path in root.glob(pattern)}
