# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for calibration: the shipped one, and random ones of other architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "models" / "tiny-nemotron-h"
TEXT = ROOT / "docs" / "architecture.md"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "tie_word_embeddings": True,
}
MOE = json.loads((TINY / "config.json").read_text()) | {
    "hybrid_override_pattern": "*E",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "n_routed_experts": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
}

Source = Callable[[str], torch.Tensor]


def tiny_source() -> Source:
    """Tensors of the shipped model."""
    file = safe_open(str(TINY / "model.safetensors"), "pt")
    names = set(file.keys())

    def source(name: str) -> torch.Tensor:
        if name not in names:
            raise KeyError(name)
        return file.get_tensor(name)

    return source


def random_model(folder: Path, config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Write config.json, and return random weights with the names of a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 3 and ".experts." in name:
            parent, leaf = name.rsplit(".", 1)
            for i, expert in enumerate(tensor):
                tensors[f"{parent}.{i}.{leaf}.weight"] = expert.clone()
        else:
            tensors[name] = tensor.clone()
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return tensors


def sequences(count: int, tokens: int, vocabulary: int) -> list[torch.Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (tokens,), generator=generator) for _ in range(count)]
