"""Write a trained model as a checkpoint that looks like a stock Nemotron-H one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_model.model import TinyConfig, TinyNemotronH
from tiny_model.tokens import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS

CONTEXT = 2048  # the longest text a server will take; nothing in the model has a length


def model_config(cfg: TinyConfig, context: int = CONTEXT) -> dict[str, Any]:
    """Return config.json, with the fields of NVIDIA-Nemotron-Nano-9B-v2's (but no remote code)."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "chunk_size": 128,
        "conv_kernel": cfg.conv_kernel,
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "expand": 2,
        "head_dim": cfg.head_dim,
        "hidden_dropout": 0.0,
        "hidden_size": cfg.hidden_size,
        "hybrid_override_pattern": cfg.pattern,
        "initializer_range": cfg.initializer_range,
        "intermediate_size": cfg.intermediate_size,
        "layer_norm_epsilon": cfg.norm_eps,
        "mamba_head_dim": cfg.mamba_head_dim,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": cfg.mamba_num_heads,
        "mamba_proj_bias": False,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h",
        "n_groups": cfg.n_groups,
        "num_attention_heads": cfg.num_attention_heads,
        "num_hidden_layers": len(cfg.pattern),
        "num_key_value_heads": cfg.num_key_value_heads,
        "num_logits_to_keep": 1,
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rms_norm_eps": cfg.norm_eps,
        "sliding_window": None,
        "ssm_state_size": cfg.ssm_state_size,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_limit": [0.0, float("inf")],
        "time_step_max": cfg.time_step_max,
        "time_step_min": cfg.time_step_min,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
        "vocab_size": cfg.vocab_size,
    }


def tokenizer_config(context: int = CONTEXT) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    tokens = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    return {
        "added_tokens_decoder": tokens,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": context,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON that ends in a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(
    weights: dict[str, Tensor],
    cfg: TinyConfig,
    prepared: Path,
    out: Path,
    context: int = CONTEXT,
) -> None:
    """Write weights (as bf16), configs, tokenizer and held-out text into ``out``.

    Args:
        weights: tensors by their names in a checkpoint.
        cfg: sizes of the model.
        prepared: folder with tokenizer.json and heldout.txt.
        out: folder for the checkpoint.
        context: the longest text that the checkpoint promises to take.
    """
    out.mkdir(parents=True, exist_ok=True)
    rounded = {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()}
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes its files private
    config = model_config(cfg, context)
    write_json(out / "config.json", config)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(out / "tokenizer_config.json", tokenizer_config(context))
    for name in ("tokenizer.json", "heldout.txt"):
        shutil.copyfile(prepared / name, out / name)


def load_exported(out: Path, cfg: TinyConfig) -> TinyNemotronH:
    """Read the exported bf16 weights back into a model that computes in fp32."""
    model = TinyNemotronH(cfg)
    weights = load_file(out / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model.eval().requires_grad_(False)
