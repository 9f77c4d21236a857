# SPDX-License-Identifier: Apache-2.0
"""Our integers as `pack-quantized`: bit for bit, or a reason why not."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint.formats import FormatError, detect, read_module
from vllm_nanoquant.checkpoint.formats.export import (
    check_layout,
    is_symmetric,
    pack_config,
    packed_layout,
    to_pack_quantized,
)
from vllm_nanoquant.checkpoint.header import DTYPE_BITS
from vllm_nanoquant.checkpoint.reader import TORCH_DTYPES

MODULE = "model.layers.0.mlp.up_proj"


@given(
    st.integers(1, 20), st.integers(1, 4), st.sampled_from([32, 64, 128, -1]), st.booleans(),
    st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_there_and_back(rows, groups, group, symmetric, seed):
    columns = groups * (7 if group == -1 else group)
    w = Int4(rows, columns, group, seed=seed, symmetric=symmetric)
    given = packers.pack_quantized(w, symmetric=symmetric)
    config = {"quantization_config": pack_config({MODULE: group}, [], symmetric)}
    fmt = detect(config, [f"{MODULE}.{name}" for name in given])
    weight = read_module(fmt, MODULE, given).weight
    check_layout(MODULE, columns, group, ordered=False)
    assert symmetric <= is_symmetric(MODULE, weight.zero_point)
    found = to_pack_quantized(weight, symmetric)
    assert sorted(found) == sorted(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
    layout = packed_layout(rows, columns, group, symmetric)
    assert list(layout) == list(found)
    for name, (dtype, shape) in layout.items():
        assert (TORCH_DTYPES[dtype], shape) == (found[name].dtype, tuple(found[name].shape))
        assert dtype in DTYPE_BITS


def test_the_library_reads_it():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    w = Int4(24, 96, 32)
    options = pack_config({MODULE: 32}, ["model.embed_tokens"], False)
    scheme = QuantizationConfig.model_validate(options).config_groups["group_0"]
    given = packers.pack_quantized(w)
    fmt = detect({"quantization_config": options}, [f"{MODULE}.{name}" for name in given])
    tensors = to_pack_quantized(read_module(fmt, MODULE, given).weight, False)
    tensors["weight_scale"] = tensors["weight_scale"].double()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"].double(), w.values())


def test_a_ragged_group_is_refused():
    with pytest.raises(FormatError, match=r"up_proj has 100 inputs.*last group of 32 is shorter"):
        check_layout(MODULE, 100, 32, ordered=False)


def test_an_order_is_refused():
    with pytest.raises(FormatError, match=r"columns of .*up_proj are in the order"):
        check_layout(MODULE, 128, 32, ordered=True)


@pytest.mark.parametrize("bad", [-0.5, 1.0, -16.0, float("nan")])
def test_other_zero_points_are_refused(bad):
    zero_point = torch.full((2, 3), -8.0).bfloat16()
    zero_point[1, 2] = bad
    with pytest.raises(FormatError, match=r"1 zero points of .*up_proj .*output 2, group 1"):
        is_symmetric(MODULE, zero_point)


@pytest.mark.parametrize(("value", "expected"), [(-8.0, True), (0.0, False), (-15.0, False)])
def test_symmetric_is_8_everywhere(value, expected):
    zero_point = torch.full((2, 3), -8.0).bfloat16()
    zero_point[0, 1] = value
    assert is_symmetric(MODULE, zero_point) is expected


def test_one_size_targets_the_class_and_several_the_names():
    one = pack_config({"a.q_proj": 32, "a.k_proj": 32}, ["b"], True)
    assert [group["targets"] for group in one["config_groups"].values()] == [["Linear"]]
    assert one["ignore"] == ["b", "lm_head"]
    several = pack_config({"a.q_proj": 32, "lm_head": -1, "a.k_proj": 32}, ["b"], False)
    groups = several["config_groups"].values()
    assert [group["targets"] for group in groups] == [["lm_head"], ["a.k_proj", "a.q_proj"]]
    assert [group["weights"]["strategy"] for group in groups] == ["channel", "group"]
    assert several["ignore"] == ["b"]


def test_the_library_is_missing(monkeypatch):
    name = "compressed_tensors.compressors.pack_quantized.helpers"
    monkeypatch.setitem(sys.modules, name, None)
    given = packers.pack_quantized(Int4(8, 64, 32))
    config = {"quantization_config": pack_config({MODULE: 32}, [], False)}
    fmt = detect(config, [f"{MODULE}.{suffix}" for suffix in given])
    weight = read_module(fmt, MODULE, given).weight
    with pytest.raises(FormatError, match="pip install compressed-tensors"):
        to_pack_quantized(weight, False)
