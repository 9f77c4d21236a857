# SPDX-License-Identifier: Apache-2.0
"""The compilation hook on real VllmConfig objects, with CUDA graphs pretended on the CPU."""

import json
import logging
import os
import shutil

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from tests.checkpoints import write_int4  # noqa: E402
from vllm_nanoquant import compilation  # noqa: E402
from vllm_nanoquant.recipe import METHOD  # noqa: E402

pytestmark = pytest.mark.compat
LARGEST = "max_cudagraph_capture_size"


@pytest.fixture(autouse=True)
def _graphs_on_the_cpu(monkeypatch):
    """vLLM chooses capture sizes only where graphs exist; its choice needs no GPU."""
    monkeypatch.setattr(
        type(current_platform), "support_static_graph_mode", classmethod(lambda cls: True)
    )
    # The CPU platform switches graphs off after the sizes are fixed; here only the sizes matter.
    monkeypatch.setattr(
        type(current_platform), "check_and_update_config", classmethod(lambda cls, config: None)
    )
    monkeypatch.delenv("VLLM_USE_BYTECODE_HOOK", raising=False)


@pytest.fixture
def messages():
    """What vLLM's logger, and ours below it, says."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler = Keep()
    logging.getLogger("vllm").addHandler(handler)
    yield records
    logging.getLogger("vllm").removeHandler(handler)


def capture_sizes(model, options=None, quantization=METHOD, **engine):
    """Capture sizes of the engine that these arguments describe."""
    graphs = {"cudagraph_mode": engine.pop("mode", CUDAGraphMode.FULL_AND_PIECEWISE)}
    for name, key in (("sizes", "cudagraph_capture_sizes"), ("largest", LARGEST)):
        if name in engine:
            graphs[key] = engine.pop(name)
    config = EngineArgs(
        model=str(model),
        quantization=quantization,
        hf_overrides={"quantization_config": options} if options else {},
        compilation_config=CompilationConfig(**graphs),
        max_model_len=512,
        **engine,
    ).create_engine_config()
    return config.compilation_config.cudagraph_capture_sizes


@pytest.mark.parametrize(
    ("engine", "sizes"),
    [
        ({}, [1, 2, 4, 8]),
        ({"max_num_seqs": 1}, [1]),
        ({"max_num_seqs": 3}, [1, 2, 3]),
        ({"max_num_seqs": 6}, [1, 2, 4, 6]),
        ({"max_num_seqs": 8}, [1, 2, 4, 8]),
        ({"largest": 64}, [1, 2, 4, 8]),
        ({"largest": 4}, [1, 2, 4]),
        ({"sizes": [1, 2, 4]}, [1, 2, 4]),
        ({"sizes": [1, 3, 8, 16, 64]}, [1, 3, 8]),
        ({"options": {"max_capture_size": 32}}, [1, 2, 4, 8, 16, 24, 32]),
        ({"options": {"max_capture_size": 32}, "max_num_seqs": 9}, [1, 2, 4, 8, 9]),
        ({"options": {"max_capture_size": 20}}, [1, 2, 4, 8, 16, 20]),
        ({"options": {"max_capture_size": 16}, "sizes": [16, 32]}, [16]),
    ],
)
def test_sizes_with_our_method(tiny_model, engine, sizes):
    assert capture_sizes(tiny_model, **engine) == sizes


NGRAM = {"method": "ngram", "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    ("engine", "sizes"),
    [
        # Multiples of one drafted token more, for as many sequences as without drafts.
        ({}, [5, 10, 20, 40]),
        ({"max_num_seqs": 3}, [5, 10, 15]),
        ({"options": {"max_capture_size": 16}}, [5, 10, 20, 40, 80]),
        ({"largest": 20}, [5, 10, 20]),
        ({"sizes": [5, 10, 80]}, [5, 10]),
        # More tokens for one sequence than the cap has for all.
        ({"drafted": 9}, [10, 20, 40, 80]),
    ],
)
def test_sizes_with_speculative_decoding(tiny_model, engine, sizes):
    drafted = engine.pop("drafted", 4)
    engine.setdefault("max_num_seqs", 16 if "options" in engine else 8)
    engine["speculative_config"] = {**NGRAM, "num_speculative_tokens": drafted}
    assert capture_sizes(tiny_model, **engine) == sizes


@pytest.mark.parametrize(
    ("method", "second", "sizes"),
    [
        ("draft_model", True, [1, 2, 4, 5, 8, 10, 20, 40]),
        ("draft_model", False, [5, 10, 20, 40]),
        ("ngram", True, [5, 10, 20, 40]),
    ],
)
def test_a_model_that_drafts_has_graphs_in_the_second_model_runner(
    tiny_model, monkeypatch, method, second, sizes
):
    config = EngineArgs(
        model=str(tiny_model),
        quantization=METHOD,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        speculative_config={**NGRAM, "num_speculative_tokens": 4},
    ).create_engine_config()
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", second)
    config.model_config.enforce_eager = False
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.cudagraph_capture_sizes = None
    config.speculative_config.method = method
    compilation.cap_capture_sizes(config)
    assert config.compilation_config.cudagraph_capture_sizes == sizes


def test_the_way_out_with_speculative_decoding_counts_sequences(tiny_model, messages):
    speculative = {**NGRAM, "num_speculative_tokens": 4}
    capture_sizes(tiny_model, sizes=[5, 80], max_num_seqs=8, speculative_config=speculative)
    (text,) = [line for line in messages if "dropped" in line]
    assert "cap of 40" in text
    assert text.endswith("--hf-overrides.quantization_config.max_capture_size 16")


@pytest.mark.parametrize("engine", [{"enforce_eager": True}, {"mode": CUDAGraphMode.NONE}])
def test_no_graphs_stay_no_graphs(tiny_model, engine):
    assert not capture_sizes(tiny_model, **engine)


def test_other_methods_keep_their_defaults_before_and_after(tiny_model):
    before = capture_sizes(tiny_model, quantization=None, max_num_seqs=128)
    assert max(before) == 256
    capture_sizes(tiny_model)
    assert capture_sizes(tiny_model, quantization=None, max_num_seqs=128) == before


def test_the_wrapper_is_installed_once(tiny_model):
    capture_sizes(tiny_model)
    wrapped = VllmConfig._set_cudagraph_sizes
    capture_sizes(tiny_model)
    assert VllmConfig._set_cudagraph_sizes is wrapped


def test_dropped_sizes_are_named_once_with_the_way_out(tiny_model, messages):
    capture_sizes(tiny_model, sizes=[4, 16, 64], max_num_seqs=8)
    (text,) = [line for line in messages if "dropped" in line]
    assert "[16, 64]" in text
    assert "--hf-overrides.quantization_config.max_capture_size 64" in text


def test_only_sizes_above_the_cap_are_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"\[16, 32\] are above the cap of 8.*max_capture_size 32"):
        capture_sizes(tiny_model, sizes=[16, 32])


def test_more_sequences_than_graphs_are_named_once_with_two_ways_out(tiny_model, messages):
    capture_sizes(tiny_model, max_num_seqs=64)
    (text,) = [line for line in messages if "max_num_seqs is 64" in line]
    assert "--max-num-seqs 8" in text
    assert "--hf-overrides.quantization_config.max_capture_size 64" in text
    messages.clear()
    capture_sizes(tiny_model, max_num_seqs=8)
    assert not any("max_num_seqs" in line for line in messages)


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_bytecode_hook_is_refused_in_the_front_end(tiny_model, monkeypatch, value):
    monkeypatch.setenv("VLLM_USE_BYTECODE_HOOK", value)
    with pytest.raises(ValueError, match=f"VLLM_USE_BYTECODE_HOOK={value} is set.*set it to 0"):
        capture_sizes(tiny_model)


def test_the_bytecode_hook_is_no_concern_of_other_models(tiny_model, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BYTECODE_HOOK", "1")
    assert capture_sizes(tiny_model, quantization=None)


def test_unset_the_bytecode_hook_is_switched_off_by_the_worker_alone(tiny_model, monkeypatch):
    capture_sizes(tiny_model)
    assert "VLLM_USE_BYTECODE_HOOK" not in os.environ
    monkeypatch.setenv("VLLM_USE_BYTECODE_HOOK", "set by the test, so that it is restored")
    monkeypatch.delenv("VLLM_USE_BYTECODE_HOOK")
    compilation.disable_bytecode_hook()
    assert os.environ["VLLM_USE_BYTECODE_HOOK"] == "0"


def test_a_frozen_bytecode_hook_is_an_error(monkeypatch):
    class Frozen:
        VLLM_USE_BYTECODE_HOOK = True

    monkeypatch.setattr(compilation, "envs", Frozen)
    monkeypatch.setenv("VLLM_USE_BYTECODE_HOOK", "0")
    with pytest.raises(ValueError, match="frozen by an engine that ran in this process"):
        compilation.disable_bytecode_hook()


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ({}, None),
        ({"mamba_ssm_cache_dtype": "float32"}, None),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "bfloat16"),
        ({"mamba_ssm_cache_dtype": "float16", "enforce_eager": True}, "float16"),
        ({"mamba_ssm_cache_dtype": "bfloat16", "quantization": None}, None),
    ],
)
def test_rounded_states_are_named_once_with_the_way_out(tiny_model, messages, engine, dtype):
    capture_sizes(tiny_model, max_num_seqs=8, **engine)
    found = [line for line in messages if line.startswith(METHOD) and "mamba_ssm" in line]
    assert len(found) == (dtype is not None)
    if dtype:
        assert f"mamba_ssm_cache_dtype is {dtype}." in found[0]
        assert "use --mamba-ssm-cache-dtype float32" in found[0]


def test_rounded_states_that_config_json_asks_for_are_named_too(tiny_model, tmp_path, messages):
    config = json.loads((tiny_model / "config.json").read_text())
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "config.json").write_text(json.dumps(config | {"mamba_ssm_cache_dtype": "float16"}))
    capture_sizes(model, max_num_seqs=8)
    assert any(f"{METHOD}: mamba_ssm_cache_dtype is float16." in line for line in messages)


def test_the_states_stay_float32_unless_asked(tiny_model):
    engine = EngineArgs(model=str(tiny_model), quantization=METHOD, max_model_len=512)
    assert engine.create_engine_config().cache_config.mamba_ssm_cache_dtype == "float32"


def artefact_key(model, **overrides):
    """What vLLM files compiled artefacts of an engine under."""
    engine = EngineArgs(
        model=str(model), quantization=METHOD, hf_overrides=overrides, max_model_len=512
    )
    return engine.create_engine_config().compute_hash()


def test_a_changed_recipe_changes_the_key_of_compiled_artefacts(tiny_model):
    recipes = [{}, {"preset": "full"}, {"group_size": 64}, {"ignore": ["*.layers.0.*"]}]
    keys = [artefact_key(tiny_model, quantization_config=recipe) for recipe in recipes]
    assert len(set(keys)) == 4
    assert artefact_key(tiny_model, quantization_config={"preset": "full"}) == keys[1]


LAYER_0 = "backbone.layers.0.mixer.in_proj"
RECIPES = [
    {},
    {"preset": "full"},
    {"group_size": 64},
    {"algorithm": "minmax"},
    {"ignore": [LAYER_0]},
    {"overrides": {LAYER_0: {"bits": 16}}},
    {"overrides": {LAYER_0: {"group_size": 32}}},
    {"overrides": {LAYER_0: {"group_size": 64}}},
]


def test_so_does_a_changed_file_of_the_same_name(tiny_model, tmp_path):
    """vLLM itself hashes the name only; the recipe's fingerprint makes the difference."""
    file = tmp_path / "recipe.json"

    def key(recipe):
        file.write_text(json.dumps(recipe))
        return artefact_key(tiny_model, quantization_config_file=str(file))

    keys = [key(recipe) for recipe in RECIPES]
    assert len(set(keys)) == len(RECIPES)
    assert [key(recipe) for recipe in RECIPES] == keys


def test_an_order_of_columns_changes_the_key(tiny_model, tmp_path):
    """config.json is the same for both; only the tensors' headers differ."""
    module = "backbone.layers.1.mixer.down_proj"

    def ordered(tensors):
        return tensors | {f"{module}.weight_order": torch.arange(672, dtype=torch.int32)}

    keys = []
    for number, change in enumerate((dict, ordered, dict)):
        folder = tmp_path / "model"
        write_int4(tiny_model, folder, change)
        keys.append(artefact_key(folder))
        folder.rename(tmp_path / str(number))
    assert keys[0] == keys[2] != keys[1]
