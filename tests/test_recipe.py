# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import pickle
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanoquant.planner.shapes import shapes_by_config
from vllm_nanoquant.recipe import (
    Override,
    Recipe,
    RecipeError,
    Scheme,
    ServingOptions,
    matches,
)
from vllm_nanoquant.roles import LayerKind, Role, layer_kinds, role_of, sensitive_layers

GEOMETRY = Path(__file__).parent.parent / "benchmarks" / "geometry"
# The published pattern of Nemotron-Nano-9B-v2: 27 Mamba-2, 25 MLP and 4 attention layers.
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"


class HfConfig:
    def __init__(self, **values):
        self.__dict__.update(values)


KINDS_9B = layer_kinds(HfConfig(hybrid_override_pattern=NANO_9B))
LEAVES = {
    LayerKind.MAMBA: ["in_proj", "out_proj", "conv1d", "norm"],
    LayerKind.FEED_FORWARD: ["up_proj", "down_proj"],
    LayerKind.ATTENTION: ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def modules_9b():
    names = ["backbone.embeddings", "backbone.norm_f", "lm_head"]
    for index, kind in enumerate(KINDS_9B):
        names += [f"backbone.layers.{index}.mixer.{leaf}" for leaf in LEAVES[kind]]
        names.append(f"backbone.layers.{index}.norm")
    return names


def quantized(recipe):
    return {name for name in modules_9b() if recipe.scheme(name, KINDS_9B)}


def count(names, leaf):
    return sum(name.endswith(leaf) for name in names)


@pytest.mark.parametrize(
    ("preset", "mamba", "mlp", "attention", "lm_head"),
    [
        ("ssm", 54, 0, 0, 0),
        ("balanced", 54, 50, 0, 0),
        ("full", 54, 50, 16, 1),
    ],
)
def test_presets_cover_what_they_name(preset, mamba, mlp, attention, lm_head):
    found = quantized(Recipe(preset=preset))
    assert count(found, "in_proj") + count(found, "out_proj") == mamba
    assert count(found, "up_proj") + count(found, "down_proj") == mlp
    assert sum(count(found, leaf) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")) == attention
    assert count(found, "lm_head") == lm_head
    assert len(found) == mamba + mlp + attention + lm_head


def test_quality_leaves_what_feeds_attention():
    left = quantized(Recipe(preset="balanced")) - quantized(Recipe(preset="quality"))
    layers = {int(name.split(".")[2]) for name in left}
    feeds = {index - 1 for index, letter in enumerate(NANO_9B) if letter == "*"}
    assert layers == feeds
    assert all(KINDS_9B[index] is LayerKind.MAMBA for index in feeds)


def test_quality_keeps_60_modules_of_nemotron_3_nano():
    config = json.loads((GEOMETRY / "nemotron-3-nano-30b-a3b" / "config.json").read_text())
    pattern = config["hybrid_override_pattern"]
    assert [pattern.count(letter) for letter in "ME*"] == [23, 23, 6]
    kinds = layer_kinds(HfConfig(hybrid_override_pattern=pattern))
    shapes = {n.removesuffix(".weight"): shape for n, shape in shapes_by_config(config).items()}
    quality = Recipe(preset="quality")
    kept = {
        name
        for name, shape in shapes.items()
        if len(shape) > 1 and quality.scheme(name, kinds) is None
    }
    routers = {f"backbone.layers.{i}.mixer.gate" for i in range(52) if pattern[i] == "E"}
    assert routers < kept and "backbone.embeddings" in kept
    kept -= {*routers, "backbone.embeddings"}
    mixers = [f"backbone.layers.{index}.mixer" for index in range(52)]
    attention = [index for index, letter in enumerate(pattern) if letter == "*"]
    assert attention == [5, 12, 19, 26, 33, 42]
    expected = ["lm_head"]
    expected += [f"{mixers[i]}.{part}_proj" for i in attention for part in "qkvo"]
    expected += [f"{mixers[i - 1]}.{part}_proj" for i in attention for part in ("in", "out")]
    expected += [f"{mixers[i]}.conv1d" for i in range(52) if pattern[i] == "M"]
    assert len(expected) == 60
    assert kept == set(expected)
    experts = [name for name in shapes if ".experts." in name]
    assert len(experts) == 23 * 128 * 2
    assert not kept & set(experts)


def test_roles_of_experts():
    for leaf in ("up_proj", "down_proj", "gate_proj", "w1", "w2", "w3"):
        assert role_of(f"model.layers.1.mlp.experts.17.{leaf}") is Role.MLP
    for name in ("mlp.gate", "feed_forward.w1", "mlp.experts.w1", "mlp.experts.3.w4"):
        assert role_of(f"model.layers.1.{name}") is None


def test_the_mamba_layer_that_feeds_attention_need_not_be_next_to_it():
    kinds = [LayerKind(word) for word in ("mamba", "mamba", "mamba", "feed_forward", "attention")]
    assert sensitive_layers([*kinds, *kinds]) == {2, 7}


def test_quality_needs_the_kind_of_each_layer():
    with pytest.raises(RecipeError, match="hybrid_override_pattern nor layers_block_type"):
        Recipe(preset="quality").scheme("model.layers.0.mlp.up_proj", None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HfConfig(hybrid_override_pattern="M-*E"), "mamba feed_forward attention feed_forward"),
        (HfConfig(layers_block_type=["mamba", "attention", "moe"]), "mamba attention feed_forward"),
        (HfConfig(hybrid_override_pattern="M?"), None),
        (HfConfig(), None),
    ],
)
def test_layer_kinds(config, expected):
    kinds = layer_kinds(config)
    assert kinds == (expected and tuple(LayerKind(word) for word in expected.split()))


def test_precedence_is_ignore_then_the_last_override_then_the_preset():
    recipe = Recipe(
        preset="ssm",
        ignore="*.layers.0.*",
        overrides={
            "*.up_proj": {"group_size": 32},
            "*.layers.1.mixer.up_proj": {"bits": 16},
            "re:.*layers\\.2\\.mixer\\.in_proj": {"bits": 16},
            "*.layers.0.mixer.out_proj": {"bits": 4},
        },
    )
    assert recipe.scheme("backbone.layers.0.mixer.out_proj", None) is None
    assert recipe.scheme("backbone.layers.1.mixer.up_proj", None) is None
    assert recipe.scheme("backbone.layers.2.mixer.in_proj", None) is None
    assert recipe.scheme("backbone.layers.3.mixer.in_proj", None) == Scheme(128, "mse")
    assert recipe.scheme("backbone.layers.3.mixer.up_proj", None) == Scheme(32, "mse")


@pytest.mark.parametrize("leaf", ["conv1d", "norm", "gate", "embeddings", "A_log"])
def test_what_no_preset_touches(leaf):
    assert Recipe(preset="full").scheme(f"backbone.layers.3.mixer.{leaf}", KINDS_9B) is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grup_size": 64}, "unknown option 'grup_size'.*did you mean 'group_size'"),
        ({"preset": "fast"}, "preset = 'fast'.*'ssm', 'balanced', 'quality' or 'full'"),
        ({"group_size": 48}, "group_size = 48.*32, 64, 128 or -1"),
        ({"algorithm": "magic"}, "algorithm = 'magic'.*'minmax'"),
        ({"ignore": ["re:("]}, "'re:\\(' is not a regular expression"),
        ({"overrides": {"lm_head": {"bit": 4}}}, "overrides.lm_head.bit.*did you mean 'bits'"),
        ({"overrides": {"lm_head": {"bits": 8}}}, "overrides.lm_head.bits = 8.*4 or 16"),
        ({"max_capture_size": 0}, "max_capture_size = 0"),
    ],
)
def test_wrong_options_say_what_where_and_what_would_be_right(options, text):
    with pytest.raises(RecipeError, match=text):
        ServingOptions.parse(options)


def test_a_pattern_that_matches_nothing_is_named_with_near_misses():
    recipe = Recipe(ignore=["backbone.layers.0.mixer.inproj"])
    with pytest.raises(RecipeError, match=r"'backbone\.layers\.0\.mixer\.inproj'.*mixer\.in_proj"):
        recipe.check_against(modules_9b())
    Recipe(ignore=["*.conv1d", "lm_head"]).check_against(modules_9b())


def test_int4_is_refused_where_it_is_never_used():
    recipe = Recipe(overrides={"*.conv1d": {"bits": 4}})
    with pytest.raises(RecipeError, match="conv1d is never quantized"):
        recipe.check_against(modules_9b())


def test_the_fingerprint_tells_any_two_recipes_apart():
    recipes = [
        ServingOptions(),
        ServingOptions(preset="full"),
        ServingOptions(group_size=64),
        ServingOptions(ignore=["lm_head"]),
        ServingOptions(overrides={"lm_head": {"bits": 4}}),
        ServingOptions(overrides={"lm_head": {"bits": 4, "group_size": 32}}),
        ServingOptions(max_capture_size=16),
    ]
    assert len({recipe.fingerprint for recipe in recipes}) == len(recipes)
    assert ServingOptions().fingerprint == ServingOptions(preset="balanced").fingerprint


def test_options_survive_pickling():
    options = ServingOptions(ignore=["a"], overrides={"b": {"bits": 16}})
    assert pickle.loads(pickle.dumps(options)) == options


def test_renamed_patterns_stand_beside_the_written_ones():
    recipe = Recipe(ignore=["re:old\\..*", "lm_head"], overrides={"old.*": {"bits": 16}})
    renamed = recipe.with_renamed_patterns(lambda name: name.replace("old", "new"))
    assert renamed.ignore == ("re:old\\..*", "re:new\\..*", "lm_head", "lm_head")
    assert list(renamed.overrides) == ["old.*", "new.*"]
    assert renamed.with_renamed_patterns(str).scheme("new.0.in_proj", None) is None


@given(st.text(alphabet="abc.*[]?0_", max_size=12), st.text(alphabet="abc.0_", max_size=12))
def test_a_name_matches_itself_and_a_star(pattern, name):
    assert matches("*", name)
    assert matches(name, name)
    assert isinstance(matches(pattern, name), bool)


@pytest.mark.parametrize("pattern", ["re:(?:.|..|...)*(?=!)", r"re:(?:\w|\.|\w\w|\w\.)*(?=!)"])
def test_a_regex_that_would_take_for_ever_is_named(pattern):
    recipe = Recipe(overrides={pattern: Override(bits=16)})
    name = "backbone.layers.10.mixer.a_module_with_a_long_name.in_proj"
    before = time.process_time()
    with pytest.raises(RecipeError, match="takes too long for the name backbone") as caught:
        recipe.scheme(name, KINDS_9B)
    assert repr(pattern) in str(caught.value)
    assert time.process_time() - before < 2


@pytest.mark.parametrize("pattern", ["re:(a+)+$", r"re:(\w|\w\w)*!", r"re:(?:(?:\w+\.)+)+!"])
def test_nested_repeats_are_judged_in_time(pattern):
    """Those that python's own engine takes years for: quick, or an error."""
    before = time.process_time()
    with contextlib.suppress(RecipeError):
        assert not matches(pattern, "a" * 60 + ".in_proj")
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(a{9999}){9999}",
        "re:(?:(?:a{99}){99}){99}",
        "re:a{1,99999999999999999999}",
        "re:(",
        "re:*",
        "re:" + "(" * 3000,
        "re:" + "a" * 200_000,
    ],
)
def test_a_regex_that_cannot_be_compiled_is_refused_before_it_is_tried(pattern):
    with pytest.raises(RecipeError, match=r"is not a regular expression|is too large"):
        Recipe.parse({"ignore": [pattern]})
