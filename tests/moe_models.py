# SPDX-License-Identifier: Apache-2.0
"""Small models with routed experts and random weights, made when a test wants one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_nanoquant.planner.shapes import shapes_by_config

# Nemotron 3 Nano's kinds of layers, in the sizes of the shipped model. The experts' width of 232
# has 1.8 groups of 128; two ranks split it inside a group.
NEMOTRON = {
    "hybrid_override_pattern": "ME*E",
    "num_hidden_layers": 4,
    "moe_intermediate_size": 232,
    "moe_shared_expert_intermediate_size": 336,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}


def write_nemotron_moe(tiny_model, folder):
    """A Nemotron-H with experts, BF16, with the tokenizer of the shipped model."""
    config = json.loads((tiny_model / "config.json").read_text()) | NEMOTRON
    return _write(tiny_model, folder, config, shapes_by_config(config))


def _write(tiny_model, folder, config, shapes):
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_model / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * 0.05
        if name.endswith((".D", "norm.weight", "norm_f.weight")):
            values += 1
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dequantized(source, folder, **recipe):
    """A copy in float32 with the weights that the recipe's integers stand for."""
    from vllm_nanoquant.kernels.reference import dequantize
    from vllm_nanoquant.quantize.mse import quantize_mse
    from vllm_nanoquant.recipe import Recipe
    from vllm_nanoquant.roles import layer_kinds

    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    kinds = layer_kinds(type("Config", (), config))
    parsed = Recipe(**recipe)
    tensors = load_file(Path(source) / "model.safetensors")
    for name, tensor in tensors.items():
        scheme = parsed.scheme(name.removesuffix(".weight"), kinds) if tensor.dim() == 2 else None
        tensors[name] = tensor.float()
        if scheme is not None:
            tensors[name] = dequantize(quantize_mse(tensor, scheme.group_size))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_sparse_step": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 72,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1801,
}


def write_qwen_moe(tiny_model, folder):
    """A Qwen3 with gated experts, BF16, with the tokenizer of the shipped model."""
    hidden, width, head = QWEN["hidden_size"], QWEN["moe_intermediate_size"], QWEN["head_dim"]
    shapes = {"model.embed_tokens": (1801, hidden), "model.norm": (hidden,)}
    for index in range(QWEN["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm": (hidden,),
            f"{layer}.post_attention_layernorm": (hidden,),
            f"{layer}.self_attn.q_norm": (head,),
            f"{layer}.self_attn.k_norm": (head,),
            f"{layer}.self_attn.q_proj": (2 * head, hidden),
            f"{layer}.self_attn.k_proj": (head, hidden),
            f"{layer}.self_attn.v_proj": (head, hidden),
            f"{layer}.self_attn.o_proj": (hidden, 2 * head),
            f"{layer}.mlp.gate": (QWEN["num_experts"], hidden),
        }
        for expert in range(QWEN["num_experts"]):
            for leaf in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.experts.{expert}.{leaf}"] = (width, hidden)
            shapes[f"{layer}.mlp.experts.{expert}.down_proj"] = (hidden, width)
    shapes["lm_head"] = (1801, hidden)
    named = {f"{module}.weight": shape for module, shape in shapes.items()}
    return _write(tiny_model, folder, QWEN, named)
