# SPDX-License-Identifier: Apache-2.0
"""Small random models of other families, as transformers builds and saves them.

Sizes do not divide into groups of 128, and the vocabulary needs padding. What becomes int4 is
written out by hand.
"""

import json
import shutil
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.dequantized import dequantized

SIZES = {"vocab_size": 331, "hidden_size": 192, "intermediate_size": 328}
ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 2}
# The names of the Mamba-2 sizes, in all configs but Zamba2's.
MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 2}
GRANITE = {
    **ATTENTION,
    **MAMBA,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 200,
    "num_experts_per_tok": 2,
}
QKV = "*.self_attn.[qkv]_proj"


class Family(NamedTuple):
    """What to build, and what `full` must make int4."""

    config: type
    settings: dict
    int4: tuple[str, ...]
    """Patterns of the checkpoint's names."""
    ignore: tuple[str, ...] = ()
    """Of these, those to leave as they are."""
    experts: str = ""
    """Pattern of the names of routed experts, all of a layer in one tensor of three dimensions:
    int4 where they are quantized while loading; `nanoquant quantize` leaves them as they are."""


FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig,
        {"num_hidden_layers": 2, "head_dim": 32, **ATTENTION},
        (QKV, "*.self_attn.o_proj", "*.mlp.*_proj", "lm_head"),
        ("model.layers.1.mlp.down_proj",),
    ),
    # q, k and v have biases, each of which comes before its weight in the file.
    "qwen2": Family(
        transformers.Qwen2Config,
        {"num_hidden_layers": 2, **ATTENTION, "tie_word_embeddings": False},
        (QKV, "*.self_attn.o_proj", "*.mlp.*_proj", "lm_head"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    ),
    "qwen3": Family(
        transformers.Qwen3Config,
        {"num_hidden_layers": 2, "head_dim": 32, **ATTENTION, "tie_word_embeddings": True},
        (QKV, "*.self_attn.o_proj", "*.mlp.*_proj"),
        ("model.layers.0.self_attn.[qkv]_proj",),
    ),
    "granite": Family(
        transformers.GraniteMoeHybridConfig,
        {**GRANITE, "num_local_experts": 0, "position_embedding_type": "rope"},
        ("*.mamba.*_proj", QKV, "*.self_attn.o_proj", "*.shared_mlp.*_linear", "lm_head"),
        ("model.layers.2.mamba.out_proj", "*.layers.1.shared_mlp.input_linear"),
    ),
    "granite_routed": Family(
        transformers.GraniteMoeHybridConfig,
        {**GRANITE, "num_local_experts": 4},
        ("*.mamba.*_proj", QKV, "*.self_attn.o_proj", "*.shared_mlp.*_linear", "lm_head"),
        ("model.layers.0.mamba.in_proj",),
        "*.block_sparse_moe.*put_linear.weight",
    ),
    "zamba2": Family(
        transformers.Zamba2Config,
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_attention_heads": 6,
            "n_mamba_heads": 12,
            "mamba_d_state": 32,
            "mamba_ngroups": 2,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 32,
            "use_mem_rope": True,
        },
        (
            "*.mamba.*_proj",
            "model.layers.[13].linear",
            "*.shared_transformer.self_attn.?_proj",
            "*.shared_transformer.feed_forward.*_proj",
        ),
        # The second of two blocks that vLLM gives one name, and one of two Mamba mixers.
        (
            "model.layers.3.shared_transformer.feed_forward.gate_up_proj",
            "model.layers.3.shared_transformer.self_attn.o_proj",
            "model.layers.1.mamba_decoder.mamba.in_proj",
        ),
    ),
    "falcon_h1": Family(
        transformers.FalconH1Config,
        {
            **{"num_hidden_layers": 2, **ATTENTION, **MAMBA},
            **{"mamba_n_heads": 10, "mamba_d_ssm": 320},
        },
        ("*.mamba.*_proj", "*.self_attn.?_proj", "*.feed_forward.*_proj"),
        ("model.layers.1.mamba.in_proj", "model.layers.0.self_attn.o_proj"),
    ),
    "bamba": Family(
        transformers.BambaConfig,
        {"num_hidden_layers": 3, "attn_layer_indices": [1], **ATTENTION, **MAMBA},
        ("*.mamba.*_proj", QKV, "*.self_attn.o_proj", "*.feed_forward.*_proj", "lm_head"),
    ),
}


def write(name, folder):
    """Write a random model of a family in BF16; the same bytes every time."""
    family = FAMILIES[name]
    torch.manual_seed(7)
    config = family.config(**{**SIZES, **family.settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module, parameter in model.named_parameters():
        if parameter.dim() > 1 or module.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(folder)
    return folder


def modules_of(folder):
    """Names of the modules of a checkpoint that have a weight of two dimensions."""
    tensors = load_file(folder / "model.safetensors")
    ends = ".weight"
    return [n.removesuffix(ends) for n, t in tensors.items() if n.endswith(ends) and t.dim() == 2]


def int4_modules(name, folder):
    """Those that preset `full` makes int4, less the ignored ones."""
    family = FAMILIES[name]

    def named(module, patterns):
        return any(fnmatchcase(module, pattern) for pattern in patterns)

    modules = modules_of(folder)
    return {m for m in modules if named(m, family.int4) and not named(m, family.ignore)}


def write_dequantized(name, source, target):
    """Write the same model in float32 with the weights that int4 stands for."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for module in int4_modules(name, source):
        tensors[f"{module}.weight"] = dequantized(tensors[f"{module}.weight"])
    for key, tensor in tensors.items():
        if fnmatchcase(key, FAMILIES[name].experts):
            tensors[key] = torch.stack([dequantized(expert) for expert in tensor])
    save_file(
        {key: tensor.float() for key, tensor in tensors.items()}, target / "model.safetensors"
    )
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return target
