# SPDX-License-Identifier: Apache-2.0
"""The layout of redhelix/nanoquant, byte for byte."""

import pytest
import torch

from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint.formats import FormatError, detect, translate

BASE = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.10.mixer.in_proj.weight",
        "backbone.norm_f.weight"]  # fmt: skip


def options(group):
    return {"quantization_config": {"quant_type": "w4a16", "group_size": group, "bits": 4}}


@pytest.mark.parametrize(
    "key",
    [
        "backbone.layers.0.mixer.in_proj",
        "layers.0.mixer.in_proj",
        "model.layers.0.mixer.in_proj",
        "model.layers.0.mixer.in_proj.weight",
        "backbone.layers.0.mixer.in_proj.weight",
    ],
)
def test_taken_over_and_put_in_place_of_the_bf16_weight(key):
    w = Int4(6, 64, 32)
    tensors = packers.redhelix(w)
    dense = {name: torch.ones(2, 2, dtype=torch.bfloat16) for name in BASE}
    stream = dense | {f"{key}.{suffix}": tensor for suffix, tensor in tensors.items()}
    fmt = detect(options(32), stream)
    result = dict(translate(fmt, stream.items()))
    module = "backbone.layers.0.mixer.in_proj"
    assert torch.equal(result.pop(f"{module}.weight_packed"), tensors["W_q"])
    assert torch.equal(result.pop(f"{module}.weight_scale"), tensors["scales"])
    assert torch.equal(result.pop(f"{module}.weight_zero_point"), tensors["zeros"])
    assert sorted(result) == sorted(BASE[1:])
    assert fmt.integer_modules == {module: 32}


def test_values():
    w = Int4(5, 96, 32)
    tensors = packers.redhelix(w)
    key = "backbone.layers.0.mixer.in_proj"
    fmt = detect(options(32), [f"{key}.{suffix}" for suffix in tensors] + BASE)
    found = packers.ours(fmt.modules[key].read(key, tensors))
    scale, zeros = tensors["scales"].double(), tensors["zeros"].double()
    for n in range(5):
        for k in range(96):
            assert found[n, k] == (w.q[n][k] + zeros[k // 32, n]) * scale[k // 32, n]


def test_groups_of_256_become_two():
    w = Int4(4, 512, 256)
    tensors = packers.redhelix(w)
    key = "backbone.layers.0.mixer.in_proj"
    fmt = detect(options(256), [f"{key}.{suffix}" for suffix in tensors] + BASE)
    weight = fmt.modules[key].read(key, tensors).weight
    assert weight.group_size == 128
    assert torch.equal(weight.scale[[0, 2]], tensors["scales"])
    assert torch.equal(weight.scale[[1, 3]], tensors["scales"])


def broken(**changes):
    tensors = packers.redhelix(Int4(4, 64, 32)) | changes
    key = "backbone.layers.0.mixer.in_proj"
    fmt = detect(options(32), [f"{key}.{suffix}" for suffix in tensors] + BASE)
    return fmt.modules[key].read(key, tensors)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"W_q": torch.zeros(32, 4)}, "W_q is torch.float32"),
        ({"W_q": torch.zeros(31, 4, dtype=torch.uint8)}, "62 inputs are no multiple"),
        ({"scales": torch.zeros(1, 4, dtype=torch.bfloat16)}, r"scales is .* expected .*\[2, 4\]"),
        ({"zeros": torch.zeros(2, 4)}, "zeros is torch.float32"),
        ({"zeros": torch.full((2, 4), float("nan")).bfloat16()}, "zeros has values"),
    ],
)
def test_wrong_tensors(changes, text):
    with pytest.raises(FormatError, match=text):
        broken(**changes)


def test_a_module_that_replaces_nothing():
    names = [f"layers.7.mixer.in_proj.{suffix}" for suffix in ("W_q", "scales", "zeros")]
    with pytest.raises(FormatError, match="replaces 0 modules"):
        detect(options(32), names + BASE)


def test_an_incomplete_module():
    with pytest.raises(FormatError, match="scales, zeros"):
        detect(options(32), ["backbone.layers.0.mixer.in_proj.W_q", *BASE])
