# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints of ours into `pack-quantized`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.foreign import (
    DOWN,
    UP,
    awq_checkpoint,
    convert,
    fp8_checkpoint,
    under,
    write,
)
from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint.convert import PACK_QUANTIZED
from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.checkpoint.formats import FormatError
from vllm_nanoquant.checkpoint.report import read_report


def test_only_ours_becomes_pack_quantized(tmp_path):
    with pytest.raises(UsageError, match="convert it to ours first"):
        convert(awq_checkpoint(tmp_path / "a"), tmp_path / "b", to=PACK_QUANTIZED)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pack_quantized_there_and_back(tmp_path, symmetric):
    theirs = {
        "model.norm.weight": torch.ones(8).bfloat16(),
        "lm_head.weight": torch.ones(4, 8).bfloat16(),
    }
    for module, w in ((UP, Int4(8, 64, 32, seed=1, symmetric=symmetric)),
                      (DOWN, Int4(16, 96, 32, seed=2, symmetric=symmetric))):  # fmt: skip
        theirs |= under(module, packers.pack_quantized(w, symmetric=symmetric))
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group",
               "group_size": 32}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    options = {"quant_method": "compressed-tensors", "config_groups": groups}
    convert(write(tmp_path / "a", options, theirs), tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to=PACK_QUANTIZED)
    found = load_file(tmp_path / "c" / "model.safetensors")
    assert sorted(found) == sorted(theirs)
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert group["weights"].items() >= weights.items()
    assert config["ignore"] == ["lm_head"]
    assert read_report(tmp_path / "c")["quantization_config"] == config


def test_our_own_zero_points_cannot_be_pack_quantized(tmp_path):
    source, _ = fp8_checkpoint(tmp_path / "a")
    convert(source, tmp_path / "b", group_size=-1)
    with pytest.raises(FormatError, match=r"zero points of .*up_proj are not whole numbers"):
        convert(tmp_path / "b", tmp_path / "c", to=PACK_QUANTIZED)
    assert not (tmp_path / "c").exists()


def test_a_ragged_group_cannot_be_pack_quantized(tmp_path):
    w = Int4(8, 80, 32)
    options = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    source = write(tmp_path / "a", options, under(UP, packers.gptq(w, less_one=True)))
    convert(source, tmp_path / "b")
    with pytest.raises(FormatError, match=r"up_proj has 80 inputs"):
        convert(tmp_path / "b", tmp_path / "c", to=PACK_QUANTIZED)
