# SPDX-License-Identifier: Apache-2.0
"""What the front end makes of options, config.json and headers together."""

import pytest

from vllm_nanoquant.inventory import Inventory, Model, parse_options, take_inventory
from vllm_nanoquant.recipe import METHOD, RecipeError, ServingOptions

IN_PROJ, UP_PROJ = "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.up_proj"
OWN = {"quant_method": METHOD, "format_version": 1, "preset": "ssm", "group_size": 64,
       "algorithm": "gptq", "producer": {"name": "vllm-nanoquant", "version": "0"}}  # fmt: skip


def header(dtype, *shape):
    return {"dtype": dtype, "shape": list(shape)}


INT4 = {
    f"{IN_PROJ}.weight_packed": header("U8", 100, 48),
    f"{IN_PROJ}.weight_scale": header("BF16", 4, 48),
    f"{IN_PROJ}.weight_zero_point": header("BF16", 4, 48),
    f"{UP_PROJ}.weight": header("BF16", 48, 200),
}
BF16 = {f"{name}.weight": header("BF16", 48, 200) for name in (IN_PROJ, UP_PROJ)}


def take(options, tensors, written=None, claimed=None, index=None):
    files = {"config.json": {"quantization_config": written} if written else {}}
    if index is not None:
        files["model.safetensors.index.json"] = index
    model = Model("org/model", tensors, files.get, None, False)
    return take_inventory(parse_options(options), claimed, model)


def test_an_int4_checkpoint_by_its_own_config():
    found = take(OWN, INT4, OWN)
    assert set(found.int4) == {IN_PROJ}
    assert (found.options.preset, found.options.group_size) == ("ssm", 64)
    assert found.foreign is None


def test_options_that_concern_serving_alone_join_the_recipe_of_the_checkpoint():
    found = take({"quant_method": "", "max_capture_size": 32, "preset": "ssm"}, INT4, OWN)
    assert set(found.int4) == {IN_PROJ}
    assert (found.options.max_capture_size, found.options.group_size) == (32, 64)
    assert found.options.algorithm == "gptq"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"preset": "full"}, "preset is 'full', but .* quantized with preset 'ssm'"),
        ({"group_size": 32}, "group_size is 32, but .* with group_size 64"),
        ({"algorithm": "mse"}, "algorithm is 'mse', but .* with algorithm 'gptq'"),
        ({"ignore": ["*.in_proj"]}, "ignore is .* quantized with ignore"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused(option, says):
    with pytest.raises(RecipeError, match=f"{says}.*leave the option out"):
        take(option, INT4, OWN)


def test_a_future_format_is_refused_before_its_options_are_read():
    with pytest.raises(RecipeError, match=r"format_version = 2.*upgrade it"):
        parse_options(OWN | {"format_version": 2, "some_new_option": True})


def test_int4_weights_that_no_config_explains_are_refused():
    with pytest.raises(RecipeError, match=r"in_proj\.weight_packed, but its config\.json has no"):
        take({}, INT4)


def test_a_format_version_over_bf16_weights_is_refused():
    with pytest.raises(RecipeError, match=r"in_proj should be int4 by config\.json.*remove format"):
        take(OWN, BF16, OWN)


def test_a_lost_shard_is_named():
    index = {"weight_map": dict.fromkeys([*INT4, "lm_head.weight"], "model-00002-of-2.safetensors")}
    with pytest.raises(RecipeError, match=r"lm_head\.weight of model-00002-of-2\.safetensors"):
        take(OWN, INT4, OWN, index=index)


def test_gptq_while_loading_is_refused_with_the_way_out():
    with pytest.raises(RecipeError, match="nanoquant quantize org/model OUTPUT --algorithm gptq"):
        take({"algorithm": "gptq"}, BF16)
    assert take({"algorithm": "mse"}, BF16).int4 is None


def test_another_method_that_nothing_in_the_checkpoint_bears_out_is_refused():
    with pytest.raises(RecipeError, match=r"quant_method is 'fp8', but config\.json does not say"):
        take({"quant_method": "fp8"}, BF16, claimed="fp8")


def test_a_checkpoint_without_readable_headers_is_taken_at_its_word():
    assert take(OWN, {}, OWN).int4 == {}
    assert take({"preset": "full"}, {}).int4 is None


def test_names_are_known_as_the_checkpoint_and_as_the_model_has_them():
    found = take(OWN, INT4, OWN).with_renamed_modules(
        lambda name: name.replace("backbone.", "model.")
    )
    assert set(found.int4) == {IN_PROJ, IN_PROJ.replace("backbone", "model")}


def test_the_fingerprint_knows_whose_columns_are_reordered():
    order = {f"{IN_PROJ}.weight_order": header("I32", 200)}
    plain, ordered = (take(OWN, INT4 | more, OWN).fingerprint for more in ({}, order))
    assert plain != ordered
    assert plain == take(OWN, INT4, OWN).fingerprint
    recipes = (Inventory(ServingOptions(preset=preset)) for preset in ("ssm", "full"))
    assert len({recipe.fingerprint for recipe in recipes}) == 2


@pytest.mark.parametrize(
    ("module", "preset", "covers"),
    [
        ("model.layers.0.mlp.up_proj", "ssm", False),
        ("model.layers.0.self_attn.o_proj", "balanced", False),
        ("model.embed_tokens", "full", False),
        ("model.layers.0.mlp.up_proj", "balanced", True),
        # Nothing is known of the checkpoint.
        (None, "ssm", True),
    ],
)
def test_a_recipe_that_would_serve_everything_as_it_is_is_refused(module, preset, covers):
    tensors = {f"{module}.weight": header("BF16", 48, 200)} if module else {}
    if covers:
        take({"preset": preset}, tensors)
        return
    with pytest.raises(RecipeError, match=f"preset {preset}.* covers no module of org/model"):
        take({"preset": preset}, tensors)


def test_modules_that_are_fused_in_the_checkpoint_are_known_by_both_names():
    name = "backbone.layers.0.mlp.gate_up_proj"
    found = take({}, {f"{name}.weight": header("BF16", 48, 200)} | BF16)
    assert found.fused == {name}
    renamed = found.with_renamed_modules(lambda name: name.replace("backbone", "model"))
    assert renamed.fused == {name, "model.layers.0.mlp.gate_up_proj"}
    packed = f"{IN_PROJ.removesuffix('in_proj')}qkv_proj.weight_packed"
    own = {**OWN, "preset": "full"}
    tensors = {packed: header("U8", 100, 48)}
    tensors[packed.replace("packed", "scale")] = header("BF16", 4, 48)
    tensors[packed.replace("packed", "zero_point")] = header("BF16", 4, 48)
    assert take(own, tensors, own).fused == {packed.removesuffix(".weight_packed")}
