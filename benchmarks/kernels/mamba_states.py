# SPDX-License-Identifier: Apache-2.0
"""Tune how vLLM launches its update of Mamba-2 states, for a geometry, and write what it reads.

    python benchmarks/kernels/mamba_states.py --folder tuned --output results.json
    VLLM_TUNED_CONFIG_FOLDER=tuned vllm serve ...

The update reads and writes the state of every sequence at every token, beside the int4 weights a
good part of a step. vLLM looks up rows per program and warps in a file for the GPU, the head and
the state, and has none for heads of 80, as in Nemotron-Nano-9B-v2. vLLM's own benchmark of it keeps
few states, which stay in a large L2 cache; here every call has states of its own.

The error is that of the output against fp64, mean |y - expected| / mean |expected|.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from benchmarks.common import (  # noqa: E402
    GEOMETRIES,
    NO_GPU,
    geometry_folder,
    output_file,
    versions,
    write_json,
)
from benchmarks.kernels.report import describe_device  # noqa: E402
from vllm_nanoquant.kernels.accuracy import mean_relative_error  # noqa: E402
from vllm_nanoquant.kernels.timing import copies_needed, time_in_graph  # noqa: E402

BATCHES = (1, 2, 4, 8, 16, 32)
ROWS = (4, 8, 16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
REPLAYS = 9
# What is within this factor of the least time is measured once more.
CLOSE = 1.05


@dataclass(frozen=True)
class Heads:
    """Sizes of a Mamba-2 layer.

    Attributes:
        heads: of the layer, each with a state [size, state].
        size: of a head.
        state: numbers per row of a head.
        groups: of heads that share B and C.
    """

    heads: int
    size: int
    state: int
    groups: int

    @classmethod
    def of(cls, geometry: Path) -> Heads:
        """Those of a folder with a Nemotron-H config.json."""
        config = json.loads((geometry / "config.json").read_text(encoding="utf-8"))
        return cls(
            config["mamba_num_heads"],
            config["mamba_head_dim"],
            config["ssm_state_size"],
            config["n_groups"],
        )


def vllms_updates() -> ModuleType:
    """The module of vLLM. Not imported at the top: that takes seconds, and options may be wrong."""
    from vllm.model_executor.layers.mamba.ops import mamba_ssm

    return mamba_ssm


class Update:
    """One layer's update for a batch; states in fp32, of more sequences than a cache holds."""

    def __init__(self, heads: Heads, batch: int, device: torch.device) -> None:
        """Random inputs in bf16, as vLLM's mixer passes them."""

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        per_sequence = heads.heads * heads.size * heads.state
        self.calls = max(2, copies_needed(4 * per_sequence * batch))
        shape = (1 + self.calls * batch, heads.heads, heads.size, heads.state)
        self.states = torch.randn(shape, device=device)
        # Slot 0 is the one that vLLM skips.
        slots = torch.arange(1, len(self.states), device=device, dtype=torch.int32)
        self.slots = slots.reshape(self.calls, batch, 1)
        self.x = normal(batch, heads.heads, heads.size)
        self.dt = normal(batch, heads.heads)[:, :, None].expand_as(self.x)
        decay = -torch.rand(heads.heads, device=device)
        self.a = decay[:, None, None].expand(-1, heads.size, heads.state)
        self.b, self.c = (normal(batch, heads.groups, heads.state) for _ in range(2))
        self.d, self.bias = (normal(heads.heads)[:, None].expand(-1, heads.size) for _ in range(2))
        self.y = torch.empty_like(self.x)
        self._update = vllms_updates().selective_state_update

    def __call__(self, call: int) -> torch.Tensor:
        """Update the states of one call's sequences; y [batch, heads, size]."""
        self._update(
            self.states,
            self.x,
            self.dt,
            self.a,
            self.b,
            self.c,
            self.d,
            self.bias,
            dt_softplus=True,
            state_batch_indices=self.slots[call],
            dst_state_batch_indices=self.slots[call],
            out=self.y,
        )
        return self.y

    def expected(self, call: int) -> torch.Tensor:
        """What the call will return, in fp64 (Dao and Gu, 2024, arXiv:2405.21060, section 6)."""
        states = self.states[self.slots[call, :, 0].long()].double()
        per_group = self.x.shape[1] // self.b.shape[1]
        b, c = (each.double().repeat_interleave(per_group, dim=1) for each in (self.b, self.c))
        dt = torch.nn.functional.softplus(self.dt.double() + self.bias.double())[..., None]
        x = self.x.double()
        states = states * torch.exp(self.a.double() * dt) + dt * x[..., None] * b[:, :, None]
        return (states * c[:, :, None]).sum(-1) + self.d.double() * x

    def error(self) -> float:
        """Relative error of the next update of the first call's sequences."""
        expected = self.expected(0)  # before the call, which changes the states
        return mean_relative_error(self(0), expected)


def vllms_own(update: Update) -> tuple[int, int]:
    """Rows and warps with which vLLM launches it here: from a file if it has one."""
    batch, heads, size = update.x.shape
    state = update.states.shape[-1]
    device = update.x.device
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    find = vllms_updates().try_get_optimal_ssm_config
    return find(size, state, batch, heads, "float32", blackwell)


def time_settings(update: Update) -> list[dict[str, Any]]:
    """Microseconds and error with each number of rows and warps, vLLM's own first."""
    own = vllms_own(update)
    rows = [each for each in ROWS if each < 2 * update.states.shape[-2]]
    settings = [own, *(each for each in product(rows, WARPS) if each != own)]

    def measure(setting: tuple[int, int]) -> dict[str, Any]:
        with vllms_updates().override_ssm_config(setting):
            error = update.error()
            calls = [lambda call=call: update(call) for call in range(update.calls)]
            times = asdict(time_in_graph(calls, REPLAYS))
        return {"rows": setting[0], "warps": setting[1], "us": times, "error": error}

    results = [measure(each) for each in settings]
    least = min(each["us"]["median"] for each in results)
    for setting, result in zip(settings, results, strict=True):
        if setting == own or result["us"]["median"] <= CLOSE * least:
            result["us_again"] = measure(setting)["us"]
    return results


def cost(result: dict[str, Any]) -> float:
    """Median microseconds, the mean of both turns where there were two."""
    turns = [result["us"], result.get("us_again", result["us"])]
    return sum(each["median"] for each in turns) / 2


def tune(heads: Heads, device: torch.device) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Batch, bytes of states read and written, and all settings with their times."""
    for batch in BATCHES:
        update = Update(heads, batch, device)
        yield batch, 2 * update.states[1 : 1 + batch].nbytes, time_settings(update)


def line(batch: int, moved: int, name: str, result: dict[str, Any]) -> str:
    """A setting and its figures, for a person."""
    us = cost(result)
    return (
        f"batch {batch:2d}: {name} {result['rows']} rows, {result['warps']} warps: {us:.2f} us, "
        f"{moved / us / 1e3:.0f} GB/s, error {result['error']:.1e}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file for all times")
    parser.add_argument("--folder", type=Path, required=True, help="for the file that vLLM reads")
    parser.add_argument(
        "--geometry", type=geometry_folder, default=GEOMETRIES / "nemotron-nano-9b-v2"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(NO_GPU)
    try:
        heads = Heads.of(arguments.geometry)
        arguments.folder.mkdir(parents=True, exist_ok=True)
    except KeyError as error:
        parser.error(f"{arguments.geometry / 'config.json'} is not a Nemotron-H's: no {error}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device = torch.device("cuda", 0)
    report: dict[str, Any] = {
        "problem": {"geometry": arguments.geometry.name, **asdict(heads), "dtype": "float32"},
        "device": describe_device(device),
        "packages": versions(),
        "unit": "microseconds per layer and step; bytes of states read and written",
        "results": [],
    }
    chosen: dict[str, Any] = {}
    for batch, moved, found in tune(heads, device):
        best = min(found, key=cost)
        chosen[str(batch * heads.heads)] = {
            "BLOCK_SIZE_M": best["rows"],
            "num_warps": best["warps"],
        }
        report["results"].append({"batch": batch, "bytes": moved, "settings": found})
        write_json(arguments.output, report)
        print(line(batch, moved, "vLLM's own", found[0]))
        print(line(batch, moved, "best", best), flush=True)
    updates = vllms_updates()
    name = updates.get_ssm_config_file_name(
        heads.size, heads.state, "float32", updates.get_ssm_device_name()
    )
    write_json(arguments.folder / name, chosen)


if __name__ == "__main__":
    main()
