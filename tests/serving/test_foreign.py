# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools quantized, served as they are with ``--quantization``."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.quantize.groups import QuantizedWeight, pack_nibbles
from vllm_nanoquant.recipe import METHOD

from .engines import job, run_engines
from .weight_digests import digest

pytestmark = [pytest.mark.compat, pytest.mark.slow]

GROUP = 32
MODULES = [
    f"backbone.layers.{layer}.mixer.{name}_proj" for layer in (1, 4) for name in ("up", "down")
]
FP8 = torch.float8_e4m3fn
# AWQ's word holds output 8j + AWQ_ORDER[i] in bits 4i to 4i + 3.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def quantize_by_group_index(weight, g_idx):
    """q [N, K] from 0 to 15 with zero point 8, and scales [G, N] in fp16, for any grouping."""
    groups = int(g_idx.max()) + 1
    largest = torch.stack([weight[:, g_idx == g].abs().amax(dim=1) for g in range(groups)])
    scales = (largest.float() / 7).half()
    q = (weight.float() / scales.float()[g_idx].t()).round().clamp(-8, 7) + 8
    return q.to(torch.uint8), scales


def words(lines):
    """Eight integers to an int32 along the first dimension, the first in the lowest bits."""
    result = torch.zeros((lines.shape[0] // 8, lines.shape[1]), dtype=torch.int64)
    for place in range(8):
        result |= lines[place::8].long() << (4 * place)
    return torch.where(result >= 1 << 31, result - (1 << 32), result).int()


def both_forms(tensors):
    """The model with its MLPs as GPTQ stores them, and as we do."""
    gptq, ours = dict(tensors), dict(tensors)
    for seed, module in enumerate(MODULES):
        weight = tensors[f"{module}.weight"]
        rows, columns = weight.shape
        shuffle = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        g_idx = (torch.arange(columns) // GROUP)[shuffle]
        q, scales = quantize_by_group_index(weight, g_idx)
        for form in (gptq, ours):
            del form[f"{module}.weight"]
        gptq[f"{module}.qweight"] = words(q.t())
        gptq[f"{module}.qzeros"] = words(torch.full((rows, len(scales)), 7)).t().contiguous()
        gptq[f"{module}.scales"] = scales
        gptq[f"{module}.g_idx"] = g_idx.int()
        order = torch.argsort(g_idx, stable=True)
        ours[f"{module}.weight_packed"] = pack_nibbles(q[:, order])
        ours[f"{module}.weight_scale"] = scales.bfloat16()
        ours[f"{module}.weight_zero_point"] = torch.full_like(scales, -8, dtype=torch.bfloat16)
        ours[f"{module}.weight_order"] = order.int()
    return gptq, ours


def awq(tensors):
    """The model with its MLPs as AWQ stores them, zero points and all; their parts by module."""
    result, parts = dict(tensors), {}
    for module in MODULES:
        weight = result.pop(f"{module}.weight").float()
        rows = weight.shape[0]
        groups = weight.reshape(rows, -1, GROUP)
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scales = ((high - low) / 15).half()
        zero = (-low / scales.float()).round().clamp(0, 15)
        q = (groups / scales.float()[..., None]).round() + zero[..., None]
        q = q.clamp(0, 15).to(torch.uint8).reshape(weight.shape)
        result[f"{module}.qweight"] = words(in_awq_order(q)).t().contiguous()
        result[f"{module}.qzeros"] = words(in_awq_order(zero)).t().contiguous()
        result[f"{module}.scales"] = scales.t().contiguous()
        parts[module] = q, scales.t(), zero.t()
    return result, parts


def in_awq_order(lines):
    return lines.view(-1, 8, lines.shape[1])[:, AWQ_ORDER].reshape(lines.shape)


def fp8(tensors):
    """The model with its projections in FP8, one scale for each."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().max() / 448
            result[name] = (tensor.float() / scale).to(FP8)
            result[name.replace(".weight", ".weight_scale")] = scale.reshape(1)
    return result


def write(source, target, tensors, settings):
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = settings
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    tensors = load_file(tiny_model / "model.safetensors")
    gptq, ours = both_forms(tensors)
    overrides = {name: {"bits": 4, "group_size": GROUP} for name in MODULES}
    overrides = {"*": {"bits": 16}, **overrides}
    models = {
        "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True,
                        "desc_act": True}),
        "ours": (ours, {"quant_method": METHOD, "format_version": 1, "overrides": overrides}),
        "awq": (awq(tensors)[0], {"quant_method": "awq", "bits": 4, "group_size": GROUP,
                                  "zero_point": True, "version": "gemm"}),
        "fp8": (fp8(tensors), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    }  # fmt: skip
    jobs = []
    for name, (content, settings) in models.items():
        folder = write(tiny_model, root / name, content, settings)
        engine = {"quantization": METHOD}
        jobs.append(job(name, folder, engine=engine, digests=True, reload=name == "gptq"))
    return run_engines(jobs, root)


def test_gptq_in_activation_order_gives_the_bytes_of_its_form_in_our_format(reports):
    assert "error" not in reports["gptq"], reports["gptq"]
    assert "error" not in reports["ours"], reports["ours"]
    assert len(reports["gptq"]["int4"]) == len(MODULES)
    assert reports["gptq"]["digests"] == reports["ours"]["digests"]
    assert reports["gptq"]["tokens"] == reports["ours"]["tokens"]


def test_its_layers_are_named_in_the_log(reports):
    line = "loaded 4 int4 modules (gptq: 4 modules in gptq, group size 32)"
    assert sum(line in text for text in reports["gptq"]["log"]) == 1


def test_it_can_be_reloaded(reports):
    assert reports["gptq"]["reload_keeps_every_byte"]


def test_awq_keeps_its_integers_and_its_zero_points(reports, tiny_model):
    assert "error" not in reports["awq"], reports["awq"]
    assert all(reports["awq"]["texts"])
    _, parts = awq(load_file(tiny_model / "model.safetensors"))
    (found,) = reports["awq"]["digests"]
    for module, (q, scales, zero) in parts.items():
        scale, zero_point = (t.bfloat16().contiguous() for t in (scales, -zero))
        weight = QuantizedWeight(pack_nibbles(q), scale, zero_point, GROUP, q.shape[1])
        expected = RuntimeWeight.from_quantized(weight)
        name = module.replace("backbone", "model")
        assert found[f"{name}.weight_packed"] == digest(expected.words)
        assert found[f"{name}.weight_scale"] == digest(expected.scales)


def test_fp8_weights_are_quantized_again(reports):
    assert "error" not in reports["fp8"], reports["fp8"]
    assert len(reports["fp8"]["int4"]) == 14  # all 15 but the LM head
    assert any("quantized 14 modules to int4 (fp8: 16" in line for line in reports["fp8"]["log"])
    assert all(reports["fp8"]["texts"])
