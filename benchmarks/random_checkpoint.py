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
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from vllm_nanoquant.planner.shapes import shapes_by_config

SHARD_BYTES = 4_000_000_000
STANDARD_DEVIATION = 0.02


def write_checkpoint(geometry: Path, target: Path, device: str) -> int:
    """Write the checkpoint, shard by shard, and return its bytes.

    Args:
        geometry: folder with config.json.
        target: folder to make; it must not exist yet.
        device: where the random numbers are drawn; a GPU is many times faster.
    """
    target.mkdir(parents=True)
    shutil.copy(geometry / "config.json", target)
    shapes = shapes_by_config(json.loads((geometry / "config.json").read_text()))
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

    for name, shape in tqdm(shapes.items(), desc="random tensors"):
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
