# SPDX-License-Identifier: Apache-2.0
"""Bytes of a rank's weights, by hand for the 9B geometry and by properties for others."""

import json
import math
from pathlib import Path

import pytest

from vllm_nanoquant.cli.main import main
from vllm_nanoquant.planner.fit import fit
from vllm_nanoquant.planner.memory import SCRATCH_BYTES, allocated, served_bytes
from vllm_nanoquant.planner.mixers import mamba_of
from vllm_nanoquant.planner.numbers import GIB, MIB
from vllm_nanoquant.planner.settings import Settings
from vllm_nanoquant.planner.source import Facts, read_facts
from vllm_nanoquant.planner.weights import Part, Ranks, weights_of
from vllm_nanoquant.recipe import Recipe

ROOT = Path(__file__).parents[2]
NANO_9B = ROOT / "benchmarks" / "geometry" / "nemotron-nano-9b-v2"
NANO_30B = ROOT / "benchmarks" / "geometry" / "nemotron-3-nano-30b-a3b"


def by_module(model, ranks=1, expert_parallel=False):
    facts = read_facts(model)
    weights = weights_of(facts, mamba_of(facts), Ranks(ranks, expert_parallel))
    return {weight.module: weight for weight in weights}


def test_one_projection_by_hand():
    """22656 x 4480: 354 blocks of 64 rows, 35 chunks of 128 columns, nothing to pad."""
    weight = by_module(NANO_9B)["backbone.layers.0.mixer.in_proj"]
    integers = 22656 * 4480 // 2
    scales = 22656 * 35 * 4
    counters = 354 * 64 * 4
    assert weight.int4_bytes(128) == integers + scales + counters
    assert weight.int4_bytes(64) == integers + 2 * scales + counters
    assert weight.int4_bytes(-1) == integers + 22656 * 4 + counters
    assert weight.bf16_bytes == 22656 * 4480 * 2


def test_a_padded_projection_by_hand():
    """15680 columns are 122.5 chunks, which take the room of 123."""
    weight = by_module(NANO_9B)["backbone.layers.1.mixer.down_proj"]
    assert (weight.rows, weight.columns) == (4480, 15680)
    assert weight.int4_bytes(128) == 4480 * 123 * 128 // 2 + 4480 * 123 * 4 + 70 * 64 * 4


def test_ranks_by_hand():
    """Of in_proj: gate and x 5120 each, B and C of 4 of 8 groups, dt of 64 of 128 heads."""
    weights = by_module(NANO_9B, 2)
    shapes = {
        "backbone.layers.0.mixer.in_proj": (5120 + 5120 + 2 * 4 * 128 + 64, 4480),
        "backbone.layers.0.mixer.out_proj": (4480, 5120),
        "backbone.layers.1.mixer.up_proj": (7840, 4480),
        "backbone.layers.1.mixer.down_proj": (4480, 7840),
        "backbone.embeddings": (65536, 4480),
        "lm_head": (65536, 4480),
        "backbone.layers.0.mixer.conv1d": (6144 * 4, 1),
        "backbone.layers.0.mixer.norm": (5120, 1),
        "backbone.layers.0.norm": (4480, 1),
    }
    assert {name: (weights[name].rows, weights[name].columns) for name in shapes} == shapes
    # The second rank begins 32 columns inside of a group: 7840 = 61 * 128 + 32.
    down = weights["backbone.layers.1.mixer.down_proj"]
    assert down.int4_bytes(128) == 4480 * 62 * 128 // 2 + 4480 * 62 * 4 + 70 * 64 * 4
    assert down.int4_bytes(-1) == 4480 * 62 * 128 // 2 + 4480 * 4 + 70 * 64 * 4


def test_a_rank_whose_columns_begin_inside_a_group():
    """1960 columns are 15.3 chunks; the fourth rank begins 120 columns inside one, and needs 17."""
    down = by_module(NANO_9B, 8)["backbone.layers.1.mixer.down_proj"]
    assert down.columns == 1960
    assert (3 * 1960 % 128 + 1960) / 128 > 16
    assert down.int4_bytes(128) == 4480 * 17 * 128 // 2 + 4480 * 17 * 4 + 70 * 64 * 4


def test_one_group_of_a_mixer_is_repeated_on_every_rank():
    config = json.loads((NANO_9B / "config.json").read_text()) | {"n_groups": 1}
    facts = read_facts(NANO_9B)
    shapes = dict(facts.tensors)
    for name in list(shapes):
        if name.endswith("in_proj.weight"):
            shapes[name] = {"dtype": "BF16", "shape": [2 * 10240 + 2 * 128 + 128, 4480]}
        if name.endswith("conv1d.weight"):
            shapes[name] = {"dtype": "BF16", "shape": [10240 + 2 * 128, 1, 4]}
    facts = Facts("one group", config, config, shapes, "config.json")
    mamba = mamba_of(facts)
    found = {w.module: w.rows for w in weights_of(facts, mamba, Ranks(2))}
    assert found["backbone.layers.0.mixer.in_proj"] == 5120 + 5120 + 2 * 128 + 64
    assert mamba.state_bytes(2, 4) == (5120 + 2 * 128) * 3 * 2 + 64 * 80 * 128 * 4


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_ranks_together_have_the_experts_once(ranks, expert_parallel):
    one, some = by_module(NANO_30B), by_module(NANO_30B, ranks, expert_parallel)
    experts = [name for name, weight in one.items() if weight.part is Part.EXPERTS]
    assert len(experts) == 23 * 128 * 2
    whole = sum(one[name].numel for name in experts)
    assert sum(some[name].numel for name in experts) * ranks == whole
    assert sum(some[name].whole for name in experts) == whole
    width = 1856 if expert_parallel else 1856 // ranks
    assert {some[name].rows for name in experts if name.endswith("up_proj")} == {width}


def test_parts_of_the_30b_by_hand():
    parts = {}
    for weight in by_module(NANO_30B).values():
        parts[weight.part] = parts.get(weight.part, 0) + weight.numel
    assert parts[Part.MAMBA] == 23 * (10304 + 4096) * 2688
    assert parts[Part.EXPERTS] == 23 * 128 * 2 * 1856 * 2688
    assert parts[Part.SHARED] == 23 * 2 * 3712 * 2688
    assert parts[Part.ATTENTION] == 6 * (2 * 4096 + 2 * 256) * 2688
    assert parts[Part.LM_HEAD] == parts[Part.EMBEDDING] == 131072 * 2688
    routers = 23 * (128 * 2688 + 128)
    mixers = 23 * (3 * 64 + 4096 + 6144 * 5)
    assert parts[Part.OTHER] == routers + mixers + 53 * 2688
    assert Part.MLP not in parts


def test_headers_and_config_tell_the_same_shapes(tiny_model, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    by_headers, by_config = read_facts(tiny_model), read_facts(tmp_path)
    assert (by_headers.shapes_from, by_config.shapes_from) == ("safetensors headers", "config.json")
    shapes = {name: entry["shape"] for name, entry in by_headers.tensors.items()}
    assert shapes == {name: entry["shape"] for name, entry in by_config.tensors.items()}


@pytest.mark.parametrize("group_size", ["32", "128", "-1"])
def test_an_int4_checkpoint_takes_what_quantizing_while_loading_takes(
    tiny_model, tmp_path, group_size
):
    source, target = tiny_model, tmp_path / "target"
    options = ["--preset", "full", "--group-size", group_size, "--algorithm", "mse"]
    assert main(["quantize", str(source), str(target), *options]) == 0
    recipe = Recipe(preset="full", group_size=int(group_size))
    settings = Settings(24 * GIB)
    online = fit(read_facts(source), recipe, settings)
    stored = fit(read_facts(target), None, settings)
    assert stored.schemes == online.schemes
    assert stored.needs == online.needs
    assert stored.cache == online.cache


def test_the_bytes_of_a_checkpoint_are_those_of_its_file(tiny_model):
    """BF16 bytes of a model that needs no padding are the bytes of its tensors."""
    weights = by_module(tiny_model).values()
    data = sum(2 * math.prod(entry["shape"]) for entry in read_facts(tiny_model).tensors.values())
    padding = sum(w.numel - w.whole for w in weights) * 2
    assert sum(w.bf16_bytes for w in weights) == data + padding
    file = (tiny_model / "model.safetensors").read_bytes()
    assert data == len(file) - 8 - int.from_bytes(file[:8], "little")
    assert {w.part for w in weights if w.numel != w.whole} <= {Part.LM_HEAD, Part.EMBEDDING}


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (1, 512),
        (513, 1024),
        (9 * MIB + 1, 9 * MIB + 512),
        (11 * MIB + 1, 12 * MIB),  # the rest of 1 MiB less a bit is not split off
        (10 * MIB + 512, 10 * MIB + 512),  # the rest is more than 1 MiB
        (20 * MIB + 1, 22 * MIB),  # nothing is split off of 20 MiB
        (22 * MIB, 22 * MIB),
    ],
)
def test_torchs_allocator(asked, given):
    assert allocated(asked) == given


def test_the_scratch_is_that_of_the_kernels():
    """kernels/prefill.py cannot be imported without Triton."""
    source = (ROOT / "vllm_nanoquant" / "kernels" / "prefill.py").read_text()
    assert "\nSCRATCH_BYTES = 200 << 20\n" in source
    assert SCRATCH_BYTES == 200 << 20


def test_what_is_kept():
    facts = read_facts(NANO_9B)
    recipe = Recipe(preset="full", ignore=("lm_head",))
    found = fit(facts, recipe, Settings(24 * GIB))
    head = next(weight for weight in found.weights if weight.part is Part.LM_HEAD)
    assert served_bytes(head, found.schemes.get("lm_head")) == 131072 * 4480 * 2
    assert {found.schemes[name].group_size for name in found.schemes} == {128}
