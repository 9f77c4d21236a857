# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a model's tensors by its config.json, where no weight is at hand.

Nemotron-H's are derived here. Other families are built by transformers on the meta device, which
takes no memory; code of a checkpoint is never run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import printable
from vllm_nanoquant.checkpoint.naming import CONFIG
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.numbers import count_of

Shapes = dict[str, tuple[int, ...]]

_MAX_LAYERS = 1_000
_MAX_EXPERTS = 1 << 17
"""In all layers together; each is two tensors."""

# Keys of a config by which transformers fetches or chooses code; shapes do not depend on them.
_CODE = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config")


def shapes_by_config(config: Mapping[str, Any]) -> Shapes:
    """Shape of every tensor of a model's checkpoint, by name; a Nemotron-H's in file order.

    Args:
        config: config.json, or the part of it that describes the text model.

    Raises:
        PlanError: it lacks what it needs, or transformers does not know the family.
    """
    if config.get("model_type") == "nemotron_h":
        return dict(_nemotron_h(config))
    return _by_transformers(config)


def _nemotron_h(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = count_of(config, "hidden_size"), count_of(config, "vocab_size")
    mixers = {"M": _mamba, "-": _mlp, "*": _attention, "E": _mixture}
    yield "backbone.embeddings.weight", (vocabulary, hidden)
    for index, letter in enumerate(_letters(config)):
        layer = f"backbone.layers.{index}"
        yield f"{layer}.norm.weight", (hidden,)
        for name, shape in mixers[letter](config).items():
            yield f"{layer}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocabulary, hidden)


def _letters(config: Mapping[str, Any]) -> str:
    """One letter a layer, whichever way config.json says it."""
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, list):
        pattern = "".join(map(str, pattern))
    words = config.get("layers_block_type")
    if pattern is None and isinstance(words, list):
        letters = {"mamba": "M", "mlp": "-", "attention": "*", "moe": "E"}
        pattern = "".join(letters.get(str(word), "?") for word in words)
    if not isinstance(pattern, str) or not pattern or not set(pattern) <= set("M-*E"):
        raise PlanError(
            "config.json: hybrid_override_pattern must have one of the letters M, *, - and E for "
            "each layer; fetch config.json again"
        )
    if len(pattern) > _MAX_LAYERS:
        raise PlanError(f"config.json: {len(pattern)} layers; the limit is {_MAX_LAYERS}")
    experts = pattern.count("E") and pattern.count("E") * count_of(config, "n_routed_experts")
    if experts > _MAX_EXPERTS:
        raise PlanError(f"config.json: {experts} routed experts; the limit is {_MAX_EXPERTS}")
    return pattern


def _mamba(config: Mapping[str, Any]) -> Shapes:
    heads, hidden = count_of(config, "mamba_num_heads"), count_of(config, "hidden_size")
    inner = heads * count_of(config, "mamba_head_dim")
    state = count_of(config, "ssm_state_size")
    conv = inner + 2 * count_of(config, "n_groups") * state
    shapes: Shapes = {
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (inner,),
        "conv1d.weight": (conv, 1, count_of(config, "conv_kernel")),
    }
    if config.get("use_conv_bias", True):
        shapes["conv1d.bias"] = (conv,)
    return shapes | {
        "in_proj.weight": (inner + conv + heads, hidden),
        "out_proj.weight": (hidden, inner),
    }


def _mlp(config: Mapping[str, Any]) -> Shapes:
    hidden, width = count_of(config, "hidden_size"), count_of(config, "intermediate_size")
    return {"up_proj.weight": (width, hidden), "down_proj.weight": (hidden, width)}


def _mixture(config: Mapping[str, Any]) -> Shapes:
    hidden, experts = count_of(config, "hidden_size"), count_of(config, "n_routed_experts")
    width = count_of(config, "moe_intermediate_size")
    shared = count_of(config, "moe_shared_expert_intermediate_size")
    shapes: Shapes = {
        "gate.weight": (experts, hidden),
        "gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes[f"experts.{expert}.up_proj.weight"] = (width, hidden)
        shapes[f"experts.{expert}.down_proj.weight"] = (hidden, width)
    shapes["shared_experts.up_proj.weight"] = (shared, hidden)
    shapes["shared_experts.down_proj.weight"] = (hidden, shared)
    return shapes


def _attention(config: Mapping[str, Any]) -> Shapes:
    hidden = count_of(config, "hidden_size")
    heads = count_of(config, "num_attention_heads")
    head = count_of(config, "head_dim", "attention_head_dim", default=hidden // heads or 1)
    query, key = heads * head, count_of(config, "num_key_value_heads", default=heads) * head
    return {
        "q_proj.weight": (query, hidden),
        "k_proj.weight": (key, hidden),
        "v_proj.weight": (key, hidden),
        "o_proj.weight": (hidden, query),
    }


def _by_transformers(config: Mapping[str, Any]) -> Shapes:
    family = config.get("model_type")
    if not isinstance(family, str):
        raise PlanError("config.json: model_type is missing; fetch config.json again")
    if count_of(config, "num_hidden_layers", default=1) > _MAX_LAYERS:
        raise PlanError(f"config.json: num_hidden_layers is above {_MAX_LAYERS}")
    harmless = {k: v for k, v in config.items() if k not in _CODE and not k.startswith("_")}
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise PlanError(
            f"the shapes of {printable(family)!r} are not known without transformers; install it, "
            "or plan a folder that has the safetensors files"
        ) from None
    try:
        with tempfile.TemporaryDirectory() as folder:
            # By way of a file, as transformers reads some values otherwise than they are written.
            (Path(folder) / CONFIG).write_text(json.dumps(harmless), encoding="utf-8")
            described = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                described, trust_remote_code=False, attn_implementation="eager"
            )
    # Whatever a strange config does to transformers is the config's fault.
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}".splitlines()[0])
        raise PlanError(
            f"transformers cannot build {printable(family)!r} from config.json ({reason}); plan a "
            "folder that has the safetensors files"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings", described.tie_word_embeddings):
        shapes.pop("lm_head.weight", None)
    return shapes
