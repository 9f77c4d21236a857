# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of other tools, and their conversion."""

import json

import torch
from safetensors.torch import save_file

from tests.checkpoint.formats import packers
from tests.checkpoint.formats.packers import Int4
from vllm_nanoquant.checkpoint.convert import Request, prepare

LAYER = "model.layers.0.mlp."
UP, DOWN = LAYER + "up_proj", LAYER + "down_proj"
EXPERT = LAYER + "experts.3.up_proj"
GATE = LAYER + "gate"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}


def write(folder, options, *parts, **config):
    """A checkpoint of one file, or of several and an index."""
    folder.mkdir()
    if options is not None:
        config["quantization_config"] = options
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{i}.safetensors" for i in range(len(parts))]
        weight_map = {t: n for n, part in zip(names, parts, strict=True) for t in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensor.clone() for key, tensor in part.items()}, folder / name)
    return folder


def under(module, tensors):
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def awq_checkpoint(folder, **config):
    tensors = {
        "model.embed_tokens.weight": torch.ones(4, 8, dtype=torch.float16),
        "model.norm.weight": torch.ones(8, dtype=torch.float16),
        f"{UP}.bias": torch.ones(8, dtype=torch.float16),
        **under(UP, packers.awq(Int4(8, 64, 32, seed=1))),
        **under(DOWN, packers.awq(Int4(16, 96, 32, seed=2, dtype=torch.float16))),
        **under(EXPERT, packers.awq(Int4(8, 64, 32, seed=3))),
        **under(GATE, packers.awq(Int4(8, 64, 32, seed=4))),
    }
    return write(folder, AWQ, tensors, **config)


def fp8_checkpoint(folder):
    values = torch.randn((24, 200), generator=torch.Generator().manual_seed(0))
    weight = (100 * values).to(torch.float8_e4m3fn)
    tensors = {
        "model.norm.weight": torch.ones(8).bfloat16(),
        f"{DOWN}.weight": torch.ones(4, 8).bfloat16(),
    }
    for module in (UP, EXPERT, GATE):
        scales = {"weight_scale": torch.tensor(0.01), "input_scale": torch.tensor(1.0)}
        tensors |= under(module, {"weight": weight, **scales})
    return write(folder, FP8, tensors), (weight.float() * torch.tensor(0.01)).bfloat16()


def convert(source, target, **options):
    job = prepare(Request(str(source), source, target, **options))
    return job.run()
