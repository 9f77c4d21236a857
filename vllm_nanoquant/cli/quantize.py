# SPDX-License-Identifier: Apache-2.0
"""``nanoquant quantize SRC DST``."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nanoquant.cli.output import (
    OK,
    RUN_AGAIN,
    add_command,
    add_json_option,
    add_source_and_target,
    add_writing_options,
    check_device,
    megabytes,
    print_json,
    print_table,
    progress,
)
from vllm_nanoquant.cli.recipe_options import add_patterns, add_scheme

if TYPE_CHECKING:
    from vllm_nanoquant.checkpoint.quantize import QuantizeJob
    from vllm_nanoquant.recipe import Recipe

_DESCRIPTION = """\
Quantize a stock checkpoint (safetensors, BF16, FP16 or FP32) to int4, tensor by tensor, into a
folder that `vllm serve` runs without any flag. Interrupted, it goes on where it stopped when the
same command is run again.
"""

_EXAMPLES = """\
examples:
  nanoquant quantize ./nano-9b ./nano-9b-int4
  nanoquant quantize nvidia/NVIDIA-Nemotron-Nano-9B-v2 nano-9b-int4 --preset quality
  nanoquant quantize SRC DST --group-size 64 --ignore 'lm_head' --ignore '*.layers.0.*'
  nanoquant quantize SRC DST --override '*.down_proj=4/32' --override '*.o_proj=16'
  nanoquant quantize SRC DST --algorithm gptq --calibration-text text.jsonl --device cuda
  nanoquant quantize SRC DST --dry-run
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands,
        "quantize",
        "make an int4 checkpoint of a stock one",
        _DESCRIPTION,
        _EXAMPLES,
    )
    add_source_and_target(parser)
    recipe = parser.add_argument_group(
        "recipe", "ignore goes before override, override before preset"
    )
    add_scheme(recipe)
    recipe.add_argument(
        "--algorithm",
        help="how integers are chosen: mse (default) searches for the least error and needs no "
        "data; minmax is quicker on a CPU and less exact; gptq is the most exact and needs a text.",
    )
    add_patterns(recipe)
    calibration = parser.add_argument_group("calibration", "for --algorithm gptq, which needs it")
    calibration.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="plain text, or .jsonl with a text or messages on each line",
    )
    calibration.add_argument(
        "--calibration-samples",
        type=int,
        default=256,
        metavar="N",
        help="most sequences of it (default: %(default)s)",
    )
    calibration.add_argument(
        "--calibration-length",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="most tokens of a sequence (default: %(default)s)",
    )
    add_writing_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing; say what would be done and needed"
    )
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt=RUN_AGAIN)


def run(options: argparse.Namespace) -> int:
    """Carry the command out.

    Raises:
        RecipeError, UsageError, CheckpointError: as `checkpoint.quantize.prepare` and
            `QuantizeJob.run`.
    """
    # Not at the top: this imports torch.
    from vllm_nanoquant.checkpoint.calibrate import Calibration
    from vllm_nanoquant.checkpoint.quantize import Request, prepare
    from vllm_nanoquant.checkpoint.source import find_source

    recipe = _recipe(options)
    check_device(options.device)
    folder = find_source(options.source, options.revision)
    calibration = None
    if options.calibration_text is not None:
        calibration = Calibration(
            options.calibration_text, options.calibration_samples, options.calibration_length
        )
    job = prepare(
        Request(
            options.source,
            folder,
            options.target,
            recipe,
            options.max_shard_size,
            options.device,
            calibration,
        )
    )
    if options.dry_run:
        _tell_plan(job, options.json)
        return OK
    if job.is_done():
        result = {"target": str(options.target), "done_before": True}
        text = f"{options.target} is complete already, by the same recipe from the same source"
    else:
        with progress("quantize", job.source_bytes) as update:
            report = job.run(update)
        errors = [record["relative_error"] for record in report["tensors"].values()]
        result = {
            "target": str(options.target),
            "done_before": False,
            "bytes": report["bytes"],
            "quantized": len(errors),
            "mean_relative_error": sum(errors) / len(errors),
        }
        text = (
            f"{options.target}: {len(errors)} weights in int4, {recipe.in_words}; "
            f"{megabytes(report['bytes']['before'])} became {megabytes(report['bytes']['after'])}\n"
            f"serve it with: vllm serve {options.target}"
        )
    if options.json:
        print_json(result)
    else:
        print(text)
    return OK


def _recipe(options: argparse.Namespace) -> Recipe:
    from vllm_nanoquant.checkpoint.quantize import DEFAULT_RECIPE
    from vllm_nanoquant.recipe import Recipe

    given = {
        "preset": options.preset,
        "group_size": options.group_size,
        "algorithm": options.algorithm or DEFAULT_RECIPE.algorithm,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    return Recipe.parse({**chosen, "ignore": options.ignore, "overrides": dict(options.override)})


def _tell_plan(job: QuantizeJob, as_json: bool) -> None:
    """What would be done, and what it needs."""
    from vllm_nanoquant.checkpoint.job import free_bytes
    from vllm_nanoquant.roles import role_of

    counts: Counter[tuple[str, str]] = Counter()
    before: Counter[tuple[str, str]] = Counter()
    after: Counter[tuple[str, str]] = Counter()
    for step in job.plan.steps:
        role = str(role_of(step.key.rpartition(".")[0]) or "other")
        scheme = step.scheme
        kind = (role, f"int4 g{scheme.group_size}, {scheme.algorithm}" if scheme else "as it is")
        counts[kind] += 1
        before[kind] += step.source.nbytes
        after[kind] += sum(output.nbytes for output in step.outputs)
    free = free_bytes(job.request.target)
    needs = {
        "disk_bytes": job.nbytes,
        "free_bytes": free,
        "memory_bytes": job.peak_bytes,
        "calibration_bytes": job.calibration_bytes,
        "seconds": job.estimate_seconds(),
    }
    if as_json:
        parts = [
            {
                "role": k[0],
                "form": k[1],
                "tensors": counts[k],
                "before": before[k],
                "after": after[k],
            }
            for k in counts
        ]
        quantized = [step.key for step in job.plan.steps if step.scheme]
        print_json({"parts": parts, "quantized": quantized, "needs": needs})
        return
    seconds = needs["seconds"]
    time = "not predicted: it depends on how fast the model runs here"
    if seconds is not None:
        time = f"about {seconds:.0f} s, by a sample on this machine, disks aside"
    print_table(
        ("role", "form", "tensors", "before", "after"),
        [
            (*kind, str(counts[kind]), megabytes(before[kind]), megabytes(after[kind]))
            for kind in sorted(counts)
        ],
    )
    print(
        f"\ndisk    {megabytes(job.nbytes)} in {len(job.shards)} files; "
        f"{megabytes(free)} are free\n"
        f"memory  about {megabytes(job.peak_bytes)} beyond torch itself"
        f"{_calibration_in_words(job.calibration_bytes)}\n"
        f"time    {time}\n"
        "nothing was written"
    )


def _calibration_in_words(parts: dict[str, int]) -> str:
    """What calibration takes of the memory; nothing where there is none."""
    if not parts:
        return ""
    listed = ", ".join(f"{name} {megabytes(count)}" for name, count in parts.items())
    return f"\n        for calibration: {listed}"
