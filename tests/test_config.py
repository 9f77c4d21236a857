# SPDX-License-Identifier: Apache-2.0
"""What vLLM is told when it asks which method serves a checkpoint."""

import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_nanoquant import compat
from vllm_nanoquant.checkpoint.stored import Int4Module
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.recipe import METHOD, RecipeError, ServingOptions

pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    ("settings", "asked", "claimed"),
    [
        ({"group_size": 64}, METHOD, True),
        ({"quant_method": "", "group_size": 64}, METHOD, True),
        ({}, METHOD, True),
        # What --hf-overrides has put in the place of a quantization_config that named us.
        ({"max_capture_size": 32}, None, True),
        ({"quant_method": "", "preset": "ssm", "group_size": 64}, None, True),
        ({"group_size": 64}, None, False),
        ({"preset": "ssm", "bits": 4}, None, False),
        ({"preset": "ssm"}, "fp8", False),
        ({}, None, False),
        (None, METHOD, False),
        # Checkpoints of other tools.
        ({"quant_method": "gptq", "bits": 4}, METHOD, True),
        ({"quant_method": "compressed-tensors"}, METHOD, True),
        ({"quant_method": "gptq", "bits": 4}, None, False),
        ({"quant_method": "gptq", "bits": 4}, "gptq_marlin", False),
        ({"quant_method": "bitsandbytes"}, METHOD, False),
        # vLLM takes this one without asking.
        ({"quant_method": METHOD, "format_version": 1}, None, False),
    ],
)
def test_which_settings_are_claimed(settings, asked, claimed):
    answer = NanoquantConfig.override_quantization_method(settings, asked)
    assert answer == (METHOD if claimed else None)


def test_settings_of_another_tool_are_no_options_of_ours():
    config = NanoquantConfig.from_config({"quant_method": "gptq", "bits": 4, "group_size": 96})
    assert config.options == ServingOptions()


def test_options_of_ours_are_checked():
    with pytest.raises(RecipeError, match="unknown option 'bits'"):
        NanoquantConfig.from_config({"quant_method": METHOD, "bits": 4})
    with pytest.raises(RecipeError, match="format_version = 3"):
        NanoquantConfig.from_config({"quant_method": METHOD, "format_version": 3})


class Mapper:
    """As vLLM's WeightsMapper renames Nemotron-H."""

    def apply_list(self, names):
        return [name.replace("backbone.", "model.") for name in names]


def test_a_worker_finds_the_modules_of_the_checkpoint_by_its_own_names():
    parts = {
        name: Int4Module(f"backbone.layers.3.mixer.{name}", (144, 128), False)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    inventory = Inventory(
        ServingOptions(preset="full"), {part.name: part for part in parts.values()}
    )
    config = pickle.loads(pickle.dumps(NanoquantConfig(inventory)))
    config.apply_vllm_mapper(Mapper())
    config.apply_vllm_mapper(Mapper())
    mixer = "model.layers.3.mixer"
    assert config.stored_as(f"{mixer}.o_proj") == (parts["o_proj"],)
    assert config.stored_as(f"{mixer}.qkv_proj") == tuple(list(parts.values())[:3])
    assert config.stored_as("model.layers.0.mixer.in_proj") == ()


def test_a_pattern_for_a_fused_module_is_that_of_its_checkpoint():
    name = "backbone.layers.3.mlp.gate_up_proj"
    options = ServingOptions(preset="full", ignore=[name])
    parts = NanoquantConfig(Inventory(options))
    fused = NanoquantConfig(Inventory(options, fused=frozenset({name})))
    for config in (parts, fused):
        config.apply_vllm_mapper(Mapper())
    prefix = "model.layers.3.mlp.gate_up_proj"
    assert parts.scheme_for(prefix) is not None, "the checkpoint has gate_proj and up_proj"
    assert fused.scheme_for(prefix) is None


def test_layers_that_vllm_builds_under_one_name_are_told_apart_by_their_order(monkeypatch):
    monkeypatch.setattr(compat, "checkpoint_tensors", lambda *where: {})
    monkeypatch.setattr(compat, "wrap_set_cudagraph_sizes", lambda before: None)
    zamba = SimpleNamespace(
        model_type="zamba2", num_hidden_layers=9, hybrid_layer_ids=[2, 5, 8], num_mem_blocks=2
    )
    config = NanoquantConfig()
    config.maybe_update_config("some/model", hf_config=zamba)
    worker = pickle.loads(pickle.dumps(config))
    built = [worker._name_of("model.o_proj") for _ in range(4)]
    first, second = (f"model.layers.{n}.shared_transformer.self_attn.o_proj" for n in (2, 5))
    assert built == [first, second, first, second]
    assert [worker._name_of(f"{n}.linear") for n in (5, 8)] == [
        f"model.layers.{n}.linear" for n in (2, 5)
    ]


def test_headers_of_a_folder_are_read_file_by_file(tiny_model, tmp_path):
    headers = compat.checkpoint_tensors(str(tiny_model), None)
    assert headers["lm_head.weight"] == {"dtype": "BF16", "shape": [1801, 288]}
    assert "__metadata__" not in headers
    (tmp_path / "model-00002-of-2.safetensors").write_bytes(b"\x10" + bytes(7) + b"{")
    with pytest.raises(ValueError, match=r"model-00002-of-2\.safetensors: .* truncated"):
        compat.checkpoint_tensors(str(tmp_path), None)


@pytest.mark.parametrize(
    ("given", "noted", "used"), [("main", "abc", "main"), (None, "abc", "abc"), (None, None, None)]
)
def test_the_revision_of_the_headers_is_that_of_the_weights(monkeypatch, given, noted, used):
    asked = []
    monkeypatch.setattr(compat, "checkpoint_tensors", lambda *where: asked.append(where) or {})
    monkeypatch.setattr(compat, "wrap_set_cudagraph_sizes", lambda before: None)
    hf_config = SimpleNamespace(_commit_hash=noted) if noted else None
    NanoquantConfig().maybe_update_config("some/model", hf_config=hf_config, revision=given)
    assert asked == [("some/model", used)]


def test_a_json_file_of_a_checkpoint(tiny_model, tmp_path):
    assert compat.checkpoint_json(str(tiny_model), None, "config.json")["vocab_size"] == 1801
    assert compat.checkpoint_json(str(tiny_model), None, "missing.json") is None
    for text in ("{", "[1]"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(RecipeError, match=r"index\.json of .* is not"):
            compat.checkpoint_json(str(tmp_path), None, "index.json")


def test_a_layer_may_ask_again_outside_of_an_engine():
    """As attention layers do when vLLM 0.26 reloads weights."""
    assert (
        NanoquantConfig().get_quant_method(torch.nn.Module(), "model.layers.3.mixer.attn") is None
    )


def test_a_stock_checkpoint_is_quantized_while_loading():
    assert NanoquantConfig().stored_as("model.layers.3.mixer.o_proj") is None
