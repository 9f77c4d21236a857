# SPDX-License-Identifier: Apache-2.0
"""AWQ, GPTQ and pack-quantized, value for value, against packers written bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint.formats import FormatError, detect, read_module
from vllm_nanoquant.checkpoint.formats.integers import dequantize, from_integers, unpack_words

MODULE = "model.layers.0.mixer.up_proj"

sizes = st.sampled_from([32, 64, 128, -1])
seeds = st.integers(0, 1 << 30)


def read(options, tensors, module=MODULE):
    fmt = detect({"quantization_config": options}, [f"{module}.{suffix}" for suffix in tensors])
    stored = fmt.modules[module]
    assert stored.suffixes == set(tensors)
    small = ("weight_shape", "g_idx", "weight_g_idx")
    meta = {name: t if name in small else t.to("meta") for name, t in tensors.items()}
    layout = stored.layout(module, meta)
    result = read_module(fmt, module, tensors)
    assert (layout.rows, layout.columns) == result.weight.shape
    assert layout.ordered == (result.order is not None)
    assert result.weight.group_size == stored.group_size
    return result


def awq_options(group):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}


def gptq_options(group, symmetric, version="gptq"):
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric,
            "desc_act": False, "checkpoint_format": version}  # fmt: skip


def pack_options(group, symmetric, **more):
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **more}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group"}
    weights["group_size"] = None if group == -1 else group
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": groups}  # fmt: skip


def same(result, w):
    """The values, one by one, and the dense form with the same values rounded once."""
    assert torch.equal(packers.ours(result), w.values())
    dense = dequantize(result)
    assert torch.equal(dense, w.values().float().to(torch.bfloat16))


@given(st.integers(1, 3), st.integers(1, 40), sizes, seeds)
@settings(max_examples=25, deadline=None)
def test_awq(eights, columns8, group, seed):
    w = Int4(8 * eights, 4 * columns8, group, seed=seed)
    same(read(awq_options(group), packers.awq(w)), w)


def test_awq_without_zero_points_is_symmetric():
    w = Int4(8, 64, 32, symmetric=True)
    tensors = packers.awq(w)
    del tensors["qzeros"]
    same(read(awq_options(32), tensors), w)


@given(
    st.integers(1, 20), st.integers(1, 170), sizes, st.booleans(), st.booleans(), st.booleans(),
    seeds,
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_gptq(rows, columns, group, symmetric, scattered, second, seed):
    w = Int4(rows, columns, group, seed=seed, symmetric=symmetric, scattered=scattered)
    version = "gptq_v2" if second else "gptq"
    result = read(gptq_options(group, symmetric, version), packers.gptq(w, less_one=not second))
    same(result, w)
    in_order = w.g_idx == sorted(w.g_idx)
    assert (result.order is None) == in_order


def test_gptq_without_g_idx():
    w = Int4(8, 64, 32)
    same(read(gptq_options(32, False), packers.gptq(w, less_one=True, with_g_idx=False)), w)


def test_gptq_with_static_groups_needs_no_order():
    w = Int4(8, 96, 32)
    options = gptq_options(32, False) | {"desc_act": True, "static_groups": True}
    assert read(options, packers.gptq(w, less_one=True)).order is None


@pytest.mark.parametrize("stored", [7, 8])
def test_a_symmetric_gptq_checkpoint_has_zero_point_8_however_labelled(stored):
    w = Int4(8, 64, 32, symmetric=True)
    tensors = packers.gptq(w, less_one=stored == 7)
    for version in ("gptq", "gptq_v2"):
        same(read(gptq_options(32, True, version), tensors), w)


def test_rules_of_gptqmodel_change_the_group_size_of_modules():
    w = Int4(8, 128, 32)
    options = gptq_options(128, False) | {
        "dynamic": {"-:.*lm_head": {}, r"+:.*\.up_proj": {"group_size": 32}, ".*": {"bits": 8}}
    }
    same(read(options, packers.gptq(w, less_one=True)), w)


@given(
    st.integers(1, 20), st.integers(1, 170), sizes, st.booleans(), st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_pack_quantized(rows, columns, group, symmetric, scattered, seed):
    w = Int4(rows, columns, group, seed=seed, symmetric=symmetric, scattered=scattered)
    tensors = packers.pack_quantized(w, symmetric=symmetric, with_g_idx=scattered)
    same(read(pack_options(group, symmetric), tensors), w)


def test_pack_quantized_agrees_with_the_library():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = Int4(24, 96, 32)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    given = {
        "weight": w.values().float(),
        "weight_scale": w.scale.t().float(),
        "weight_zero_point": (torch.tensor(w.zero).t() - 8).to(torch.int8),
    }
    tensors = compressor.compress(given, scheme)
    same(read(pack_options(32, False), tensors), w)


def test_minus_one_in_g_idx_means_no_order():
    w = Int4(8, 64, 32)
    tensors = packers.pack_quantized(w) | {"weight_g_idx": torch.full((64,), -1).int()}
    result = read(pack_options(32, False), tensors)
    assert result.order is None
    same(result, w)


@pytest.mark.parametrize(("group", "ours"), [(256, 128), (512, 128), (192, 64), (96, 32)])
@pytest.mark.parametrize("scattered", [False, True])
def test_group_sizes_we_do_not_have_become_several_groups(group, ours, scattered):
    w = Int4(8, 600, group, scattered=scattered)
    result = read(gptq_options(group, False), packers.gptq(w, less_one=True))
    assert result.weight.group_size == ours
    same(result, w)


@pytest.mark.parametrize("group", [16, 48, 100, 0, -2])
def test_a_group_size_that_cannot_be_written_is_refused(group):
    tensors = packers.awq(Int4(8, 64, 32))
    with pytest.raises(FormatError, match=rf"group size {group} cannot.*nanoquant quantize"):
        read(awq_options(group), tensors)


def test_scales_are_rounded_to_bf16_and_counted():
    w = Int4(8, 64, 32, dtype=torch.float16)
    w.scale = torch.tensor([[1.0] * 8, [1.0, 1.0009765625, 0.5, 1.005859375] * 2]).half()
    result = read(awq_options(32), packers.awq(w))
    same(result, w)
    assert result.rounded_scales == 4
    # 1 + 1.5 / 256 lies half way between two bf16 numbers and goes to the even one, 1 + 2 / 256.
    assert result.largest_rounding == pytest.approx(0.5 / 256 / 1.005859375, rel=1e-6)


def test_scales_that_bf16_holds_are_not_counted():
    result = read(awq_options(32), packers.awq(Int4(8, 64, 32)))
    assert (result.rounded_scales, result.largest_rounding) == (0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(bad):
    tensors = packers.awq(Int4(8, 64, 32))
    tensors["scales"][1, 3] = bad
    with pytest.raises(FormatError, match=r"1 scales of .*up_proj .* output 3, group 1"):
        read(awq_options(32), tensors)


def test_a_scale_beyond_bf16_is_refused():
    q = torch.zeros((8, 32), dtype=torch.uint8)
    scale = torch.full((1, 8), 3.4e38)
    with pytest.raises(FormatError, match="8 scales of m are not finite"):
        from_integers("m", q, scale, None, 32)


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([0, 1]), seeds)
@settings(max_examples=30, deadline=None)
def test_words_unpacked_as_the_library_does(rows, columns, dim, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = (rows, columns)
    packed = [-(-size // 8) if d == dim else size for d, size in enumerate(shape)]
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 31), 1 << 31, packed, generator=generator).to(torch.int32)
    theirs = unpack_from_int32(words, 4, torch.Size(shape), dim)
    found = unpack_words(words, shape, dim)
    assert found.dtype == torch.uint8
    assert torch.equal(found, (theirs + 8).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g.fill_(0), "64 columns into group 0; 32 belong there"),
        (lambda g: g.index_fill_(0, torch.tensor([0]), 2), "values from 0 to 2"),
        (lambda g: g.index_fill_(0, torch.tensor([0]), -1), "values from -1 to 1"),
        (lambda g: g[:-8], "g_idx has 56 inputs"),
    ],
)
def test_wrong_g_idx(dtype, change, text):
    tensors = packers.gptq(Int4(8, 64, 32), less_one=True)
    tensors["g_idx"] = change(tensors["g_idx"].to(dtype))
    with pytest.raises(FormatError, match=text):
        read(gptq_options(32, False), tensors)


def test_only_the_last_group_may_be_ragged():
    w = Int4(8, 80, 32)
    tensors = packers.gptq(w, less_one=True)
    tensors["g_idx"] = (2 - tensors["g_idx"]).int()
    with pytest.raises(FormatError, match="16 columns into group 0; 32 belong there"):
        read(gptq_options(32, False), tensors)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:, :-1],
        lambda t: t[: t.shape[0] // 2],
        lambda t: t.reshape(-1),
        lambda t: t.to(torch.int64),
        lambda t: t[:0],
    ],
)
@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_tensors_that_do_not_fit_are_named(layout, name, change):
    w = Int4(16, 128, 32)
    tensors = packers.awq(w) if layout == "awq" else packers.gptq(w, less_one=True)
    options = awq_options(32) if layout == "awq" else gptq_options(32, False)
    tensors[name] = change(tensors[name])
    with pytest.raises(FormatError, match=r"up_proj"):
        read(options, tensors)


@pytest.mark.parametrize(
    "name", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"]
)
@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: t.reshape(-1, 1), lambda t: t.to(torch.uint8)]
)
def test_tensors_of_pack_quantized_that_do_not_fit_are_named(name, change):
    tensors = packers.pack_quantized(Int4(16, 128, 32))
    tensors[name] = change(tensors[name])
    with pytest.raises(FormatError, match=r"up_proj"):
        read(pack_options(32, False), tensors)


@pytest.mark.parametrize("shape", [[0, 128], [16, -128], [16, 1 << 40]])
def test_a_weight_shape_that_lies(shape):
    tensors = packers.pack_quantized(Int4(16, 128, 32))
    tensors["weight_shape"] = torch.tensor(shape)
    with pytest.raises(FormatError, match=r"up_proj"):
        read(pack_options(32, False), tensors)


def test_a_symmetric_gptq_checkpoint_with_other_zero_points_is_refused():
    tensors = packers.gptq(Int4(8, 64, 32), less_one=True)
    with pytest.raises(FormatError, match=r"sym is true.*set sym to false"):
        read(gptq_options(32, True), tensors)
