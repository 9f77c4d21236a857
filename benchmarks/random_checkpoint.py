# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of random weights in a Nemotron-H geometry, to measure real loading.

    python benchmarks/random_checkpoint.py benchmarks/geometry/nemotron-nano-9b-v2 /data/random-9b

The tensors have the names, shapes and dtypes of a stock checkpoint, in shards of about 4 GB with an
index; their values are normal with a standard deviation of 0.02. The folder is complete but for a
tokenizer: serve it with ``--skip-tokenizer-init``.

With --int4 all weights but those of lm_head and the embeddings are what vLLM's own int4 reads
(compressed-tensors, pack-quantized), with random codes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import geometry_folder
from benchmarks.end_to_end.contestants import COMPRESSED, GROUP
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.shapes import shapes_by_config

SHARD_BYTES = 4_000_000_000
STANDARD_DEVIATION = 0.02


def write_checkpoint(geometry: Path, target: Path, device: str, int4: bool = False) -> int:
    """Write the checkpoint, shard by shard, and return its bytes.

    Args:
        geometry: folder with config.json.
        target: folder to make; it must not exist yet.
        device: where the random numbers are drawn; a GPU is many times faster.
        int4: as vLLM's compressed-tensors reads it, instead of BF16.
    """
    config = json.loads((geometry / "config.json").read_text())
    shapes = shapes_by_config(config)
    target.mkdir(parents=True)  # not before: the next attempt would find it
    if int4:
        config["quantization_config"] = COMPRESSED
    (target / "config.json").write_text(json.dumps(config, indent=2))
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
        tensor.normal_(std=STANDARD_DEVIATION, generator=generator)
        for key, part in (_packed(name, tensor) if int4 else {name: tensor}).items():
            shard[key] = part.cpu()
            pending, total = pending + part.nbytes, total + part.nbytes
        if pending >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of one weight [N, K] in compressed-tensors' names and shapes; others as they are."""
    if weight.dim() != 2 or "embeddings" in name or name.startswith("lm_head"):
        return {name: weight}
    rows, length = weight.shape
    return {
        f"{name}_packed": weight[:, : length // 4].contiguous().view(torch.int32),  # any bits do
        f"{name}_scale": weight[:, : length // GROUP].abs() / 7,
        f"{name}_shape": torch.tensor([rows, length]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("geometry", type=geometry_folder, help="folder with a config.json")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--int4", action="store_true", help="for vLLM's own int4")
    arguments = parser.parse_args()
    if arguments.target.exists():
        parser.error(f"{arguments.target} exists: remove it, or name another folder")
    try:
        total = write_checkpoint(
            arguments.geometry, arguments.target, arguments.device, arguments.int4
        )
    except PlanError as error:
        parser.error(f"{arguments.geometry}: {error}")
    print(f"{arguments.target}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
