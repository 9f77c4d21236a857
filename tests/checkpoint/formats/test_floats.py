# SPDX-License-Identifier: Apache-2.0
"""FP8 and NVFP4 as dense weights, number by number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.formats import packers
from vllm_nanoquant.checkpoint.formats import FormatError, detect, read_module

MODULE = "model.layers.0.mixer.up_proj"


def read(options, tensors):
    names = [f"{MODULE}.{suffix}" for suffix in tensors]
    fmt = detect({"quantization_config": options}, names)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    layout = fmt.modules[MODULE].layout(MODULE, meta)
    result = read_module(fmt, MODULE, tensors)
    assert result.dtype == torch.bfloat16
    assert tuple(result.shape) == (layout.rows, layout.columns)
    assert fmt.requantized_modules == (MODULE,)
    return result


def fp8(rows, columns, seed=0):
    values = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    return (100 * values).to(torch.float8_e4m3fn)


def scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01).to(dtype)


def expected(weight, scale, height, width):
    """value * scale in fp32, rounded to bf16, one number at a time."""
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            product = weight[n, k].float() * scale[n // height, k // width].float()
            result[n, k] = product.to(torch.bfloat16)
    return result


def modelopt(algorithm):
    return {"quant_method": "modelopt", "quant_algo": algorithm}


def compressed(**weights):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("options", [modelopt("FP8"), compressed(strategy="tensor"),
                                     {"quant_method": "fp8"}])  # fmt: skip
def test_one_scale_for_the_tensor(options, shape):
    weight, scale = fp8(5, 9), scales(*shape)
    found = read(options, {"weight": weight, "weight_scale": scale})
    assert torch.equal(found, expected(weight, scale.reshape(1, 1), 5, 9))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scale_for_each_row(shape, dtype):
    weight, scale = fp8(6, 9), scales(*shape, dtype=dtype)
    found = read(compressed(strategy="channel"), {"weight": weight, "weight_scale": scale})
    assert torch.equal(found, expected(weight, scale.reshape(6, 1), 1, 9))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_one_scale_for_each_block(rows, columns, height, width):
    weight, scale = fp8(rows, columns), scales(-(-rows // height), -(-columns // width))
    options = {"quant_method": "fp8", "weight_block_size": [height, width]}
    if scale.shape == (rows, 1):
        return
    found = read(options, {"weight": weight, "weight_scale_inv": scale})
    assert torch.equal(found, expected(weight, scale, height, width))
    found = read(
        compressed(strategy="block", block_structure=[height, width]),
        {"weight": weight, "weight_scale": scale},
    )
    assert torch.equal(found, expected(weight, scale, height, width))


def test_blocks_of_modelopt_have_four_dimensions():
    weight, scale = fp8(130, 260), scales(2, 1, 3, 1)
    found = read(modelopt("FP8_PB_WO"), {"weight": weight, "weight_scale": scale})
    wanted = weight.float() * scale.reshape(2, 3).repeat_interleave(128, 0)[:130].repeat_interleave(
        128, 1
    )[:, :260]  # fmt: skip
    assert torch.equal(found, wanted.to(torch.bfloat16))


def nvfp4(rows, columns):
    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    return packed, (10 * scales(rows, columns // 16)).to(torch.float8_e4m3fn)


def test_nvfp4_of_modelopt():
    packed, local = nvfp4(3, 48)
    tensors = {"weight": packed, "weight_scale": local, "weight_scale_2": torch.tensor(0.0625)}
    found = read(modelopt("NVFP4"), tensors)
    wanted = packers.nvfp4_values(packed, local, 0.0625)
    assert torch.equal(found, wanted.float().to(torch.bfloat16))


def test_nvfp4_of_compressed_tensors():
    packed, local = nvfp4(3, 48)
    tensors = {"weight_packed": packed, "weight_scale": local,
               "weight_global_scale": torch.tensor([32.0])}  # fmt: skip
    options = compressed(num_bits=4, strategy="tensor_group", group_size=16)
    wanted = packers.nvfp4_values(packed, local, 1 / 32)
    assert torch.equal(read(options, tensors), wanted.float().to(torch.bfloat16))


def test_in_chunks_of_rows(monkeypatch):
    monkeypatch.setattr("vllm_nanoquant.checkpoint.formats.integers.CHUNK_WEIGHTS", 30)
    weight, scale = fp8(7, 9), scales(7, 1)
    found = read(compressed(strategy="channel"), {"weight": weight, "weight_scale": scale})
    assert torch.equal(found, expected(weight, scale, 1, 9))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": scales()}, "weight is"),
        ({"weight": fp8(4, 4), "weight_scale": scales(3)}, r"weight_scale is \[3\]"),
        ({"weight": fp8(4, 4), "weight_scale": scales(0)}, "weight_scale is"),
        ({"weight": fp8(4, 4), "weight_scale": torch.ones((), dtype=torch.int32)}, "int32"),
        ({"weight": fp8(4, 4), "weight_scale": torch.tensor(float("nan"))}, "not finite"),
        (
            {
                "weight": torch.full((4, 4), 127).byte().view(torch.float8_e4m3fn),
                "weight_scale": scales(),
            },
            "not finite",
        ),
        ({"weight": fp8(4, 4)[0], "weight_scale": scales()}, "expected a matrix"),
    ],
)
def test_fp8_that_does_not_fit(tensors, text):
    with pytest.raises(FormatError, match=text):
        read(modelopt("FP8"), tensors)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weight_packed": torch.zeros(3, 20, dtype=torch.uint8)}, "40 inputs, no multiple of 16"),
        ({"weight_packed": torch.zeros(3, 24)}, "weight_packed is torch.float32"),
        ({"weight_scale": torch.zeros(3, 3)}, "weight_scale is torch.float32"),
        ({"weight_global_scale": torch.tensor([0.0])}, "is 0, and the weights are divided"),
        ({"weight_global_scale": torch.ones(2)}, "expected one number"),
    ],
)
def test_nvfp4_that_does_not_fit(changes, text):
    packed, local = nvfp4(3, 48)
    tensors = {"weight_packed": packed, "weight_scale": local,
               "weight_global_scale": torch.tensor([32.0])}  # fmt: skip
    with pytest.raises(FormatError, match=text):
        read(compressed(num_bits=4, strategy="tensor_group", group_size=16), tensors | changes)
