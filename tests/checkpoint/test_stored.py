# SPDX-License-Identifier: Apache-2.0
"""What the headers of an int4 checkpoint may and may not say."""

import pytest

from vllm_nanoquant.checkpoint.stored import (
    Int4Module,
    read_modules,
    require_every_file,
    require_known_version,
    require_shape,
)
from vllm_nanoquant.recipe import Recipe, RecipeError
from vllm_nanoquant.roles import LayerKind

IN_PROJ, UP_PROJ = "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.up_proj"


def header(dtype, *shape):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}


def int4(module, rows=48, columns=300, groups=3, order=False):
    headers = {
        f"{module}.weight_packed": header("U8", (columns + 1) // 2, rows),
        f"{module}.weight_scale": header("BF16", groups, rows),
        f"{module}.weight_zero_point": header("BF16", groups, rows),
    }
    return headers | ({f"{module}.weight_order": header("I32", columns)} if order else {})


def dense(module):
    return {f"{module}.weight": header("BF16", 48, 300)}


def read(tensors, tied=False, **recipe):
    return read_modules(tensors, Recipe(**recipe), None, tied)


@pytest.mark.parametrize("columns", [300, 299])
@pytest.mark.parametrize("order", [False, True])
def test_what_the_recipe_names_is_found(columns, order):
    tensors = int4(IN_PROJ, columns=columns, order=order) | dense(UP_PROJ)
    tensors |= {"backbone.norm_f.weight": header("BF16", 300)}
    assert read(tensors, preset="ssm") == {IN_PROJ: Int4Module(IN_PROJ, (150, 48), order)}


def test_a_group_may_be_a_whole_row_and_a_module_may_have_a_group_size_of_its_own():
    tensors = int4(IN_PROJ, groups=1) | int4(UP_PROJ, groups=10)
    overrides = {UP_PROJ: {"bits": 4, "group_size": 32}}
    assert set(read(tensors, preset="ssm", group_size=-1, overrides=overrides)) == {
        IN_PROJ,
        UP_PROJ,
    }


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(names)}


WRONG = {
    "no scale": (without(int4(IN_PROJ), "_scale"), r"in_proj\.weight_scale is missing beside"),
    "no zero point": (
        without(int4(IN_PROJ), "_point"),
        r"in_proj\.weight_zero_point is missing beside",
    ),
    "no packed weight": (
        without(int4(IN_PROJ), "_packed"),
        r"in_proj\.weight_\w+ belongs to an int4 weight, but .*in_proj\.weight_packed is missing",
    ),
    "packed by another format": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_packed": header("I32", 48, 38)},
        r"in_proj\.weight_packed is I32 \[48, 38\]; it must be U8",
    ),
    "scale in fp16": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_scale": header("F16", 3, 48)},
        r"in_proj\.weight_scale is F16 \[3, 48\]; it must be BF16",
    ),
    "zero point of another shape": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_zero_point": header("BF16", 4, 48)},
        r"weight_zero_point is BF16 \[4, 48\]; it must be BF16 \[3, 48\]",
    ),
    "scale of other rows": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_scale": header("BF16", 3, 40)},
        r"weight_scale is BF16 \[3, 40\]; it must be BF16 \[3, 48\]",
    ),
    "packed of one dimension": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_packed": header("U8", 7200)},
        r"weight_packed is U8 \[7200\]",
    ),
    "packed of none": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_packed": header("U8")},
        r"weight_packed is U8 \[\]",
    ),
    "nothing in it": (int4(IN_PROJ, rows=0), r"weight_packed is U8 \[150, 0\]"),
    "order of another length": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_order": header("I32", 298)},
        r"weight_order is I32 \[298\]; it must be I32 \[300\]",
    ),
    "order of another dtype": (
        int4(IN_PROJ) | {f"{IN_PROJ}.weight_order": header("I64", 300)},
        r"weight_order is I64 \[300\]; it must be I32",
    ),
    "another group size": (
        int4(IN_PROJ, groups=5),
        r"in_proj\.weight_scale has 5 groups, and 300 columns in groups of 128 are 3",
    ),
    "BF16 where the recipe says int4": (
        int4(IN_PROJ) | dense(IN_PROJ.replace("in_proj", "out_proj")),
        r"out_proj should be int4 by config.json .* has .*out_proj\.weight and no",
    ),
    "int4 where the recipe says BF16": (
        int4(IN_PROJ) | int4(UP_PROJ),
        r"up_proj\.weight_packed is int4, but by config.json \(preset ssm.* stays in BF16",
    ),
    "both": (int4(IN_PROJ) | dense(IN_PROJ), r"has both .*weight_packed and .*in_proj\.weight;"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_header_is_an_error_that_names_the_tensor(name):
    tensors, says = WRONG[name]
    with pytest.raises(RecipeError, match=says) as raised:
        read(tensors, preset="ssm")
    assert any(way in str(raised.value) for way in ("fetch", "run 'nanoquant quantize'"))


def test_a_tied_lm_head_in_int4_is_refused_and_in_bf16_left_alone():
    with pytest.raises(RecipeError, match=r"lm_head\.weight_packed .*tie_word_embeddings"):
        read(int4("lm_head"), tied=True, preset="full")
    assert read(dense("lm_head"), tied=True, preset="full") == {}


def test_routed_experts_are_int4_like_other_modules():
    expert = "backbone.layers.1.mixer.experts.3.up_proj"
    assert set(read(int4(expert), preset="balanced")) == {expert}
    with pytest.raises(RecipeError, match=r"experts\.3\.up_proj should be int4 by config\.json"):
        read(dense(expert), preset="balanced")
    assert read(dense(expert), preset="balanced", ignore="*.experts.*") == {}


def test_experts_in_one_tensor_stay_dense():
    expert = "backbone.layers.1.mixer.experts.up_proj"
    assert set(read(dense(expert) | int4(IN_PROJ), preset="balanced")) == {IN_PROJ}


def test_preset_quality_knows_the_kinds():
    kinds = [LayerKind.MAMBA, LayerKind.MAMBA, LayerKind.ATTENTION]
    tensors = int4("model.layers.0.mixer.in_proj") | dense("model.layers.1.mixer.in_proj")
    found = read_modules(tensors, Recipe(preset="quality"), kinds, False)
    assert set(found) == {"model.layers.0.mixer.in_proj"}


@pytest.mark.parametrize(
    ("version", "way_out"),
    [(2, "upgrade it"), (0, "fetch config.json again"), ("1", "fetch"), (True, "fetch"),
     (None, "fetch"), (1.0, "fetch")],
)  # fmt: skip
def test_an_unknown_version_is_refused(version, way_out):
    with pytest.raises(RecipeError, match=f"reads version 1: {way_out}"):
        require_known_version(version)


def test_the_known_version_is_accepted():
    require_known_version(1)


@pytest.mark.parametrize(
    ("rows", "columns", "fits"),
    [(80, 300, True), (80, 299, True), (80, 301, False), (80, 298, False), (79, 300, False)],
)
def test_shapes_are_held_against_the_model(rows, columns, fits):
    modules = [Int4Module("q", (150, 48), False), Int4Module("k", (150, 32), False)]
    if fits:
        require_shape(modules, rows, columns, "qkv")
        return
    with pytest.raises(RecipeError, match=r"q\.weight_packed is \[150, 48\].*qkv needs"):
        require_shape(modules, rows, columns, "qkv")


def test_a_tensor_that_only_the_index_knows_names_its_file():
    index = {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}
    require_every_file(["a.weight", "b.weight"], index)
    require_every_file(["a.weight"], None)
    with pytest.raises(RecipeError, match=r"the first is b\.weight of model-2\.safetensors; fetch"):
        require_every_file(["a.weight"], index)
