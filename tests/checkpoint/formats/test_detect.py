# SPDX-License-Identifier: Apache-2.0
"""Which format a checkpoint has, what becomes of its modules, and tensors as a stream."""

import pickle
import random

import pytest
import torch

from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint.formats import (
    FormatError,
    ModuleScheme,
    detect,
    translate,
    with_side_configs,
)

UP = "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
ROLELESS = "model.layers.1.mlp.gate"
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}


def awq_checkpoint(*modules):
    tensors = {"model.norm.weight": torch.ones(4, dtype=torch.float16)}
    for seed, module in enumerate(modules):
        for suffix, tensor in packers.awq(Int4(8, 64, 32, seed=seed)).items():
            tensors[f"{module}.{suffix}"] = tensor
    return tensors


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "nanoquant_w4a16", "format_version": 1}},
    ],
)
def test_nothing_to_translate(config):
    assert detect(config, ["model.norm.weight"]) is None


def test_what_becomes_of_modules():
    fmt = detect(AWQ, awq_checkpoint(UP, EXPERT, ROLELESS))
    assert fmt.scheme(UP) == ModuleScheme(32, True)
    assert fmt.scheme(EXPERT) == ModuleScheme(32, False)
    assert fmt.scheme(ROLELESS) == ModuleScheme(32, False)
    assert fmt.scheme("model.norm") is None
    assert fmt.integer_modules == {UP: 32}
    assert fmt.requantized_modules == ()
    assert fmt.in_words == "awq: 3 modules in awq, group size 32"


def test_modules_that_are_not_served_in_int4_come_as_bf16():
    tensors = awq_checkpoint(UP, EXPERT, ROLELESS)
    result = dict(translate(detect(AWQ, tensors), tensors.items()))
    for seed, module in ((1, EXPERT), (2, ROLELESS)):
        wanted = Int4(8, 64, 32, seed=seed).values().float().to(torch.bfloat16)
        assert torch.equal(result[f"{module}.weight"], wanted)
    assert result[f"{UP}.weight_packed"].shape == (32, 8)


def test_the_order_of_a_stream_does_not_matter():
    tensors = awq_checkpoint(UP, "lm_head", "model.layers.3.mixer.in_proj")
    fmt = detect(AWQ, tensors)
    wanted = dict(translate(fmt, tensors.items()))
    assert sorted(wanted) == sorted(
        [f"{module}.{suffix}" for module in (UP, "lm_head", "model.layers.3.mixer.in_proj")
         for suffix in ("weight_packed", "weight_scale", "weight_zero_point")]
        + ["model.norm.weight"]
    )  # fmt: skip
    for seed in range(5):
        items = list(tensors.items())
        random.Random(seed).shuffle(items)
        found = dict(translate(fmt, items))
        assert sorted(found) == sorted(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_only_incomplete_modules_are_kept():
    tensors = awq_checkpoint(UP, "lm_head")
    fmt = detect(AWQ, tensors)
    seen = []

    def stream():
        for name, tensor in tensors.items():
            seen.append(name)
            yield name, tensor

    for name, _ in translate(fmt, stream()):
        if name.startswith(UP):
            assert not any(other.startswith("lm_head") for other in seen)


def test_order_comes_out_as_a_tensor():
    w = Int4(8, 64, 32, scattered=True)
    tensors = {f"{UP}.{name}": t for name, t in packers.gptq(w, less_one=True).items()}
    options = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    result = dict(translate(detect({"quantization_config": options}, tensors), tensors.items()))
    order = result[f"{UP}.weight_order"]
    assert order.dtype == torch.int32
    assert [w.g_idx[k] for k in order.tolist()] == sorted(w.g_idx)


def test_a_module_left_incomplete_is_named():
    tensors = awq_checkpoint(UP, "lm_head")
    fmt = detect(AWQ, tensors)
    del tensors["lm_head.scales"]
    with pytest.raises(FormatError, match=r"1 modules are incomplete: lm_head\.scales never came"):
        list(translate(fmt, tensors.items()))


def test_a_tensor_that_comes_twice():
    tensors = awq_checkpoint(UP)
    fmt = detect(AWQ, tensors)
    name = f"{UP}.qweight"
    with pytest.raises(FormatError, match=rf"{UP}\.qweight came twice"):
        list(translate(fmt, [(name, tensors[name])] * 2))


def test_a_tensor_without_its_scale():
    fmt = detect(AWQ, awq_checkpoint(UP))
    fp8 = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"experts\.gate_up_proj is torch\.float8_e4m3fn"):
        list(translate(fmt, [("model.experts.gate_up_proj", fp8)]))


def test_scales_of_activations_are_dropped():
    tensors = {
        f"{UP}.weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
        f"{UP}.weight_scale": torch.tensor(0.5),
        f"{UP}.input_scale": torch.tensor(0.25),
        f"{UP}.bias": torch.zeros(2),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0),
        "model.layers.0.self_attn.attn.v_scale": torch.tensor(1.0),
    }
    options = {"quant_method": "modelopt", "quant_algo": "FP8"}
    fmt = detect({"quantization_config": options}, tensors)
    result = dict(translate(fmt, tensors.items()))
    assert sorted(result) == [f"{UP}.bias", f"{UP}.weight"]
    assert torch.equal(result[f"{UP}.weight"], torch.full((2, 4), 0.5, dtype=torch.bfloat16))


def test_a_mixture_of_storages():
    group = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    options = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": group | {"group_size": 128}},
            "b": {"targets": ["re:.*lm_head"], "weights": group | {"group_size": 32}},
            "c": {"targets": ["model.layers.0.mixer.in_proj"],
                  "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
        },
    }  # fmt: skip
    tensors = {
        "model.layers.0.mixer.in_proj.weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
        "model.layers.0.mixer.in_proj.weight_scale": torch.tensor([0.5]),
    }
    for module, w in ((UP, Int4(8, 256, 128)), ("lm_head", Int4(8, 64, 32))):
        for suffix, tensor in packers.pack_quantized(w).items():
            tensors[f"{module}.{suffix}"] = tensor
    fmt = detect({"quantization_config": options}, tensors)
    assert fmt.integer_modules == {UP: 128, "lm_head": 32}
    assert fmt.requantized_modules == ("model.layers.0.mixer.in_proj",)
    assert len(dict(translate(fmt, tensors.items()))) == 7


def test_a_format_can_be_sent_to_another_process():
    tensors = awq_checkpoint(UP)
    fmt = pickle.loads(pickle.dumps(detect(AWQ, tensors)))
    assert len(dict(translate(fmt, tensors.items()))) == 4


GPTQ_NAMES = [f"{UP}.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx")]
PACK_NAMES = [f"{UP}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape")]


def pack(**weights):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    return {"quant_method": "compressed-tensors",
            "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "names", "text"),
    [
        ({"quant_method": "bitsandbytes"}, [], "'bitsandbytes'; what can be read is AWQ"),
        ({"quant_method": "awq"}, ["a.weight"], "quantized by awq, but no tensor"),
        ({"quant_method": "awq", "bits": 8}, GPTQ_NAMES, "8 bits; only 4"),
        ({"quant_method": "awq", "version": "gemv"}, GPTQ_NAMES, "version 'gemv'"),
        ({"quant_method": "awq", "group_size": "x"}, GPTQ_NAMES, "group_size is 'x'"),
        ({"quant_method": "awq"}, [f"{UP}.qweight"], "but not scales"),
        ({"quant_method": "gptq", "bits": 3}, GPTQ_NAMES, "up_proj has 3 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, GPTQ_NAMES, "'marlin'"),
        ({"quant_method": "gptq", "sym": 1}, GPTQ_NAMES, "sym is 1"),
        ({"quant_method": "gptq"}, [f"{UP}.qweight", f"{UP}.scales"], "but not qzeros"),
        ({"quant_method": "gptq", "dynamic": {"+:(": {}}}, GPTQ_NAMES, "not a regular expression"),
        ({"quant_method": "gptq", "dynamic": ["x"]}, GPTQ_NAMES, "dynamic is .* an object"),
        (pack(num_bits=8), PACK_NAMES, "int with 8 bits"),
        (pack(symmetric=False), PACK_NAMES, "but not weight_zero_point"),
        (pack(group_size=16), PACK_NAMES, "group size 16 cannot"),
        (pack(strategy="tensor"), PACK_NAMES, "strategy 'tensor'"),
        (pack(), PACK_NAMES[:-1], "but not weight_shape"),
        (pack() | {"config_groups": None}, PACK_NAMES, "config_groups is None"),
        (pack() | {"config_groups": {}}, PACK_NAMES, "no group in .* names it"),
        (pack(type="int", num_bits=8), [f"{UP}.weight", f"{UP}.weight_scale"], "int with 8 bits"),
        ({"quant_method": "modelopt"}, [f"{UP}.weight_scale"], "not a weight with its scale"),
        (
            {"quant_method": "modelopt"},
            [f"{UP}.weight", f"{UP}.weight_scale", f"{UP}.pre_quant_scale"],
            "pre_quant_scale",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, [], "weight_block_size is"),
        ("awq", [], "quantization_config in config.json is 'awq'"),
    ],
)
def test_what_cannot_be_read_is_said_early(options, names, text):
    with pytest.raises(FormatError, match=text):
        detect({"quantization_config": options}, names)


def test_control_characters_do_not_reach_the_terminal():
    with pytest.raises(FormatError) as caught:
        detect(AWQ, ["a\x1b[2J.qweight"])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("quantization_config.json", {"quant_type": "w4a16", "group_size": 64}, None),
    ],
)
def test_settings_in_a_file_of_their_own(file, content, method):
    config = with_side_configs({"model_type": "x"}, {file: content}.get)
    assert config["quantization_config"].get("quant_method") == method
    assert config["model_type"] == "x"
    inner = content.get("quantization", content)
    assert config["quantization_config"].items() >= inner.items()


def test_config_json_wins_over_other_files():
    config = with_side_configs(AWQ, {"quantize_config.json": {"bits": 4}}.get)
    assert config == AWQ


def test_settings_of_a_text_model():
    tensors = awq_checkpoint(UP)
    assert detect({"text_config": AWQ}, tensors).name == "awq"
