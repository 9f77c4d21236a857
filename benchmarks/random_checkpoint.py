# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of random weights in a Nemotron-H geometry, to measure real loading.

    python benchmarks/random_checkpoint.py benchmarks/geometry/nemotron-nano-9b-v2 /data/random-9b

The tensors have the names, shapes and dtypes of a stock checkpoint, in shards of about 4 GB with an
index; their values are normal with a standard deviation of 0.02. The folder is complete but for a
tokenizer: serve it with ``--skip-tokenizer-init``.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

SHARD_BYTES = 4_000_000_000
STANDARD_DEVIATION = 0.02


def tensor_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Nemotron-H checkpoint, in file order.

    Args:
        config: the model's config.json; ``hybrid_override_pattern`` gives the layers.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "backbone.embeddings.weight", (vocabulary, hidden)
    mixers = {"M": _mamba_shapes, "-": _mlp_shapes, "*": _attention_shapes, "E": _moe_shapes}
    for index, letter in enumerate(config["hybrid_override_pattern"]):
        layer = f"backbone.layers.{index}"
        yield f"{layer}.norm.weight", (hidden,)
        for name, shape in mixers[letter](config).items():
            yield f"{layer}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _mamba_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    heads, hidden = config["mamba_num_heads"], config["hidden_size"]
    inner = heads * config["mamba_head_dim"]
    conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    return {
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (inner,),
        "conv1d.weight": (conv, 1, config["conv_kernel"]),
        "conv1d.bias": (conv,),
        "in_proj.weight": (inner + conv + heads, hidden),
        "out_proj.weight": (hidden, inner),
    }


def _mlp_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    return {"up_proj.weight": (width, hidden), "down_proj.weight": (hidden, width)}


def _moe_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    width, shared = config["moe_intermediate_size"], config["moe_shared_expert_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (experts, hidden),
        "gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes[f"experts.{expert}.up_proj.weight"] = (width, hidden)
        shapes[f"experts.{expert}.down_proj.weight"] = (hidden, width)
    shapes["shared_experts.up_proj.weight"] = (shared, hidden)
    shapes["shared_experts.down_proj.weight"] = (hidden, shared)
    return shapes


def _attention_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    query = config["num_attention_heads"] * head
    key = config["num_key_value_heads"] * head
    return {
        "q_proj.weight": (query, hidden),
        "k_proj.weight": (key, hidden),
        "v_proj.weight": (key, hidden),
        "o_proj.weight": (hidden, query),
    }


def write_checkpoint(geometry: Path, target: Path, device: str) -> int:
    """Write the checkpoint, shard by shard, and return its bytes.

    Args:
        geometry: folder with config.json.
        target: folder to make; it must not exist yet.
        device: where the random numbers are drawn; a GPU is many times faster.
    """
    target.mkdir(parents=True)
    shutil.copy(geometry / "config.json", target)
    shapes = list(tensor_shapes(json.loads((geometry / "config.json").read_text())))
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = pending = number = 0

    def flush() -> None:
        nonlocal shard, pending, number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, pending = {}, 0

    for name, shape in tqdm(shapes, desc="random tensors"):
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        shard[name] = tensor.normal_(std=STANDARD_DEVIATION, generator=generator).cpu()
        pending, total = pending + tensor.nbytes, total + tensor.nbytes
        if pending >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("geometry", type=Path, help="folder with a config.json")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    total = write_checkpoint(arguments.geometry, arguments.target, arguments.device)
    print(f"{arguments.target}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
