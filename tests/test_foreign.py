# SPDX-License-Identifier: Apache-2.0
"""What becomes of the modules of a checkpoint that another tool quantized."""

import pickle

import pytest
import torch

from tests.checkpoint.formats import packers
from vllm_nanoquant.checkpoint.formats import FormatError
from vllm_nanoquant.foreign import find_foreign
from vllm_nanoquant.recipe import RecipeError, ServingOptions

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}


def checkpoint(*modules, scattered):
    tensors = {"model.norm.weight": torch.ones(8)}
    for module in modules:
        weight = packers.Int4(16, 64, 32, scattered=module in scattered)
        parts = packers.gptq(weight, less_one=True)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    return tensors


def find(options, tensors, config=None, tied=False, **recipe):
    config = {"quantization_config": options} if config is None else config
    return find_foreign(config, tensors, {}.get, ServingOptions(**recipe), None, tied)


def test_integers_are_taken_over_and_the_rest_is_left_alone():
    tensors = checkpoint(UP, scattered=[]) | {f"{DOWN}.weight": torch.ones(64, 16)}
    foreign = find(GPTQ, tensors)
    assert foreign.schemes == {UP: (32, "as stored")}
    assert [(name, module.ordered) for name, module in foreign.int4.items()] == [(UP, True)]


def test_every_module_that_may_be_ordered_gets_an_order():
    tensors = checkpoint(UP, DOWN, scattered=[DOWN])
    foreign = pickle.loads(pickle.dumps(find(GPTQ, tensors)))
    ours = dict(foreign.translate(tensors.items()))
    assert set(ours) == {"model.norm.weight"} | {
        f"{module}.weight_{what}"
        for module in (UP, DOWN)
        for what in ("packed", "scale", "zero_point", "order")
    }
    assert ours[f"{UP}.weight_order"].tolist() == list(range(64))
    assert ours[f"{DOWN}.weight_order"].tolist() != list(range(64))
    assert ours[f"{UP}.weight_order"].dtype == torch.int32


@pytest.mark.parametrize("last", [UP, DOWN])
def test_whichever_module_comes_last(last):
    first = UP if last is DOWN else DOWN
    tensors = checkpoint(first, last, scattered=[])
    ours = dict(find(GPTQ, tensors).translate(tensors.items()))
    assert f"{last}.weight_order" in ours
    assert f"{first}.weight_order" in ours


def test_without_activation_order_no_module_has_an_order():
    options = GPTQ | {"desc_act": False}
    tensors = checkpoint(UP, scattered=[])
    foreign = find(options, tensors)
    assert not foreign.int4[UP].ordered
    assert f"{UP}.weight_order" not in dict(foreign.translate(tensors.items()))


def test_an_order_that_the_config_denies_is_an_error():
    tensors = checkpoint(UP, scattered=[UP])
    foreign = find(GPTQ | {"desc_act": False}, tensors)
    with pytest.raises(FormatError, match=r"desc_act is false in config\.json; set it"):
        dict(foreign.translate(tensors.items()))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FP8_NAMES = [
    f"{module}.{suffix}"
    for module in (UP, "model.layers.0.self_attn.o_proj", "lm_head")
    for suffix in ("weight", "weight_scale_inv")
]


def test_dense_formats_are_quantized_again_whole_unless_a_preset_is_asked_for():
    assert set(find(FP8, FP8_NAMES).schemes) == {
        UP, "model.layers.0.self_attn.o_proj", "lm_head"
    }  # fmt: skip
    some = find(FP8, FP8_NAMES, preset="balanced", group_size=64, algorithm="mse")
    assert some.schemes == {UP: (64, "mse")}
    assert some.int4 == {}
    assert "lm_head" not in find(FP8, FP8_NAMES, ignore=["lm_head"]).schemes


def test_a_tied_lm_head_is_never_int4():
    assert "lm_head" not in find(FP8, FP8_NAMES, tied=True).schemes


def test_weights_in_a_file_of_their_own_must_be_converted_first():
    names = ["layers.0.mixer.in_proj.W_q", "layers.0.mixer.in_proj.scales"]
    names += ["layers.0.mixer.in_proj.zeros", "backbone.layers.0.mixer.in_proj.weight"]
    with pytest.raises(RecipeError, match="run 'nanoquant convert'"):
        find({}, names, config={})


def test_a_stock_checkpoint_is_not_foreign():
    assert find({}, [f"{UP}.weight"], config={}) is None


def test_the_default_device_does_not_move_the_conversion():
    """The library that reads NVFP4 makes tensors without naming a device."""
    tensors = {
        f"{UP}.weight": torch.randint(0, 256, (16, 32), dtype=torch.uint8),
        f"{UP}.weight_scale": torch.ones(16, 4).to(torch.float8_e4m3fn),
        f"{UP}.weight_scale_2": torch.ones(1),
    }
    foreign = find({"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors)
    with torch.device("meta"):  # stands for the GPU
        ours = dict(foreign.translate(tensors.items()))
        assert torch.empty(1).is_meta
    assert not ours[f"{UP}.weight"].is_meta
