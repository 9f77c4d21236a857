# SPDX-License-Identifier: Apache-2.0
"""What the recipe makes of the modules of every family, by the checkpoint's names and by vLLM's."""

import json
from fnmatch import fnmatchcase

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.families.models import FAMILIES, dequantized, int4_modules, modules_of, write
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.checkpoint.source import kinds_of
from vllm_nanoquant.checkpoint.verify import verify
from vllm_nanoquant.families import LayerNames, keeps_lm_head
from vllm_nanoquant.recipe import Recipe, RecipeError
from vllm_nanoquant.roles import Role, layer_kinds, role_of, sensitive_layers

MAMBA = ("*.mamba.in_proj", "*.mamba.out_proj")
MLP = (
    *("*.mlp.*_proj", "*.feed_forward.*_proj"),
    *("*.shared_mlp.input_linear", "*.shared_mlp.output_linear"),
)
PLAIN = ["llama", "qwen2", "qwen3"]
HYBRIDS = [name for name in FAMILIES if name not in PLAIN]
KINDS = {
    "granite": "mamba attention mamba",
    "granite_routed": "mamba attention mamba",
    "bamba": "mamba attention mamba",
    "zamba2": "mamba attention mamba attention",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: write(name, folder / name) for name in FAMILIES}


def covered(folder, **recipe):
    kinds = layer_kinds(AutoConfig.from_pretrained(folder))
    return {name for name in modules_of(folder) if Recipe(**recipe).scheme(name, kinds)}


def named(folder, patterns):
    return {m for m in modules_of(folder) if any(fnmatchcase(m, p) for p in patterns)}


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_mean_the_same_in_every_family(models, name):
    model = models[name]
    assert covered(model, preset="ssm") == named(model, MAMBA)
    assert covered(model, preset="balanced") == named(model, MAMBA + MLP)
    full = covered(model, preset="full", ignore=FAMILIES[name].ignore)
    # Falcon-H1 has an LM head of its own, which vLLM does not quantize.
    kept = {"lm_head"} if name == "falcon_h1" else set()
    assert full - kept == int4_modules(name, model)
    assert bool(named(model, MAMBA)) == (name in HYBRIDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_override_of_everything_reaches_no_router_adapter_or_embedding(models, name):
    everything = covered(models[name], preset="ssm", overrides={"*": {"bits": 4}})
    assert everything == covered(models[name], preset="full")
    assert not any("embed" in m or "router" in m or "adapter" in m for m in everything)


@pytest.mark.parametrize("name", KINDS)
def test_layer_kinds_are_the_same_by_the_config_and_by_the_file(models, name):
    kinds = layer_kinds(AutoConfig.from_pretrained(models[name]))
    assert [str(kind) for kind in kinds] == KINDS[name].split()
    text = (models[name] / "config.json").read_text()
    assert kinds_of(json.loads(text)) == kinds
    older = text.replace("linear_attention", "mamba").replace("full_attention", "attention")
    assert kinds_of(json.loads(older)) == kinds


@pytest.mark.parametrize("name", KINDS)
def test_quality_leaves_whole_layers_and_none_without_a_mamba_mixer_for_attention(models, name):
    kinds = layer_kinds(AutoConfig.from_pretrained(models[name]))
    left = covered(models[name], preset="balanced") - covered(models[name], preset="quality")
    assert {int(module.split(".")[2]) for module in left} == set(sensitive_layers(kinds))
    assert 0 in sensitive_layers(kinds), "layer 0 feeds the attention of layer 1"


@pytest.mark.parametrize("name", [*PLAIN, "falcon_h1"])
def test_quality_is_refused_where_no_mamba_layer_can_be_told_from_attention(models, name):
    with pytest.raises(RecipeError, match="tells Mamba layers from attention layers; choose"):
        covered(models[name], preset="quality")


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("model.layers.3.self_attn.out_proj", Role.ATTENTION),
        ("model.decoder.layers.3.attn.dense", Role.ATTENTION),
        ("model.layers.3.mamba.out_proj", Role.MAMBA),
        ("model.layers.3.linear_attn.out_proj", Role.MAMBA),
        ("model.layers.3.linear", Role.ATTENTION),
        ("model.layers.3.shared_mlp.input_linear", Role.MLP),
        ("model.layers.3.block_sparse_moe.input_linear", None),
        ("model.layers.3.block_sparse_moe.router.layer", None),
        ("model.layers.3.adapter.linear", None),
        ("model.layers.3.mlp.dense", None),
        ("linear", None),
    ],
)
def test_a_name_means_what_its_parent_makes_of_it(module, role):
    assert role_of(module) is role


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("config", "prefix", "names"),
    [
        ({"model_type": "granitemoehybrid"}, "model.layers.2.mixer.in_proj",
         ["model.layers.2.mamba.in_proj"]),
        ({"model_type": "granitemoehybrid"}, "model.layers.2.self_attn.o_proj", None),
        ({"model_type": "falcon_h1", "num_hidden_layers": 5}, "model.7.mixer.out_proj",
         ["model.layers.2.mamba.out_proj"]),
        ({"model_type": "falcon_h1", "num_hidden_layers": 5}, "model.layers.4.qkv_proj",
         ["model.layers.4.self_attn.qkv_proj"]),
        ({"model_type": "falcon_h1"}, "model.layers.4.feed_forward.down_proj", None),
        ({"model_type": "zamba2", "hybrid_layer_ids": [6, 11], "num_mem_blocks": 2},
         "5.mixer.in_proj", ["model.layers.3.mamba.in_proj"]),
        ({"model_type": "zamba2", "hybrid_layer_ids": [6, 11], "num_mem_blocks": 2},
         "8.mixer.in_proj", ["model.layers.6.mamba_decoder.mamba.in_proj"]),
        ({"model_type": "zamba2", "hybrid_layer_ids": [6, 11], "num_mem_blocks": 2},
         "13.linear", ["model.layers.11.linear"]),
        ({"model_type": "zamba2", "hybrid_layer_ids": [6, 11, 17], "num_mem_blocks": 2},
         "model.feed_forward.down_proj",
         ["model.layers.6.shared_transformer.feed_forward.down_proj",
          "model.layers.11.shared_transformer.feed_forward.down_proj"]),
        ({"model_type": "zamba2", "hybrid_layer_ids": [6], "num_mem_blocks": 1}, "model.o_proj",
         ["model.layers.6.shared_transformer.self_attn.o_proj"]),
        ({"model_type": "zamba2", "hybrid_layer_ids": [6]}, "model.linear_q_adapter.A", None),
        ({"model_type": "zamba2"}, "lm_head", None),
        ({"model_type": "llama"}, "model.layers.2.mixer.in_proj", None),
        ({}, "model.7.mixer.out_proj", None),
    ],
)  # fmt: skip
def test_the_names_that_a_layer_is_loaded_by(config, prefix, names):
    assert list(LayerNames.of(Config(**config)).names(prefix)) == (names or [prefix])


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"model_type": "falcon_h1", "tie_word_embeddings": False}, True),
        ({"model_type": "zamba2"}, True),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "llama"}, False),
    ],
)
def test_which_lm_heads_stay_as_they_are(config, kept):
    assert keeps_lm_head(Config(**config)) is kept


@pytest.mark.parametrize("name", FAMILIES)
def test_an_offline_checkpoint_has_the_same_modules_in_int4_and_is_sound(models, name, tmp_path):
    recipe = Recipe(preset="full", ignore=FAMILIES[name].ignore)
    target = tmp_path / "int4"
    prepare(Request(name, models[name], target, recipe)).run()
    assert not list(verify(target).problems)
    tensors, source = (load_file(folder / "model.safetensors") for folder in (target, models[name]))
    wanted = int4_modules(name, models[name])
    ends = ".weight_packed"
    assert {n.removesuffix(ends) for n in tensors if n.endswith(ends)} == wanted
    for module in wanted:
        packed = tensors[f"{module}.weight_packed"].t()
        weight = dequantized(source[f"{module}.weight"])
        scale = tensors[f"{module}.weight_scale"].t().float()
        zero = tensors[f"{module}.weight_zero_point"].t().float()
        integers = (packed.unsqueeze(2) >> packed.new_tensor([0, 4])) & 15
        columns = weight.shape[1]
        values = integers.flatten(1)[:, :columns].float()
        group = [column // 128 for column in range(columns)]
        assert ((values + zero[:, group]) * scale[:, group]).equal(weight), module
    assert "mamba_ssm_cache_dtype" not in json.loads((target / "config.json").read_text())
