# SPDX-License-Identifier: Apache-2.0
"""Small stock checkpoints, written with the safetensors library, not with the code under test."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-*",
    "tie_word_embeddings": False,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "time_step_limit": [0.0, float("inf")],
}


def weights(seed=0, wide=96):
    """Tensors of a model with one layer of each kind; odd sizes on purpose."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    return {
        "backbone.embeddings.weight": normal(31, wide),
        "backbone.layers.0.mixer.A_log": normal(3).float(),
        "backbone.layers.0.mixer.conv1d.weight": normal(7, 1, 4),
        "backbone.layers.0.mixer.in_proj.weight": normal(70, wide),
        "backbone.layers.0.mixer.out_proj.weight": normal(wide, 130),
        "backbone.layers.0.norm.weight": normal(wide),
        "backbone.layers.1.mixer.up_proj.weight": normal(45, wide),
        "backbone.layers.1.mixer.down_proj.weight": normal(33, 45).half(),
        "backbone.layers.2.mixer.q_proj.weight": normal(32, wide),
        "backbone.layers.2.mixer.k_proj.weight": normal(16, wide),
        "backbone.layers.2.mixer.v_proj.weight": normal(16, wide).float(),
        "backbone.layers.2.mixer.o_proj.weight": normal(wide, 32),
        "lm_head.weight": normal(31, wide),
    }


def write_stock(folder: Path, tensors=None, shards=2, config=None, **more) -> Path:
    """Write a stock checkpoint of one or several files."""
    folder.mkdir(parents=True)
    tensors = weights() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {}), **more}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("free as in test\n")
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
