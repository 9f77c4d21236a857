# SPDX-License-Identifier: Apache-2.0
"""``nanoquant convert SRC DST``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

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
    progress,
)

_DESCRIPTION = """\
Convert a checkpoint that another tool quantized into ours, module by module. The integers of AWQ,
GPTQ, compressed-tensors (pack-quantized) and redhelix/nanoquant are taken over as they are. FP8 and
NVFP4 weights are quantized again, which puts a second error on top of the first. With --to
pack-quantized, one of ours becomes a compressed-tensors checkpoint that vLLM serves without the
plugin. Interrupted, it goes on where it stopped when the same command is run again.
"""

_EXAMPLES = """\
examples:
  nanoquant convert ./nano-9b-w4a16 ./nano-9b-int4
  nanoquant convert nvidia/NVIDIA-Nemotron-Nano-9B-v2-FP8 nano-9b-int4 --group-size 64
  nanoquant convert ./nano-9b-int4 ./nano-9b-ct --to pack-quantized
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands,
        "convert",
        "take over a checkpoint of another tool, or hand one to it",
        _DESCRIPTION,
        _EXAMPLES,
    )
    add_source_and_target(parser)
    parser.add_argument(
        "--to",
        choices=("nanoquant", "pack-quantized"),
        default="nanoquant",
        help="format of the result (default: %(default)s)",
    )
    again = parser.add_argument_group("weights that are quantized again (FP8, NVFP4)")
    again.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        default=128,
        help="weights that share a scale; -1 for a whole row (default: %(default)s)",
    )
    again.add_argument(
        "--algorithm",
        choices=("minmax", "mse"),
        default="mse",
        help="how integers are chosen: mse (default) searches, minmax is quicker",
    )
    add_writing_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt=RUN_AGAIN)


def run(options: argparse.Namespace) -> int:
    """Carry the command out.

    Raises:
        UsageError, FormatError, CheckpointError: as `checkpoint.convert.prepare` and
            `ConvertJob.run`.
    """
    # Not at the top: this imports torch.
    from vllm_nanoquant.checkpoint.convert import Request, prepare, summary
    from vllm_nanoquant.checkpoint.errors import printable
    from vllm_nanoquant.checkpoint.report import read_report
    from vllm_nanoquant.checkpoint.source import find_source

    check_device(options.device)
    job = prepare(
        Request(
            name=options.source,
            folder=find_source(options.source, options.revision),
            target=options.target,
            to=options.to,
            group_size=options.group_size,
            algorithm=options.algorithm,
            max_shard_bytes=options.max_shard_size,
            device=options.device,
        )
    )
    if job.requantized:
        print(
            f"nanoquant: warning: {len(job.requantized)} weights are not int4 in the source and "
            f"are quantized again: {options.algorithm}'s error comes on top of the source's own. "
            "Quantizing the unquantized model is better",
            file=sys.stderr,
        )
    if job.made_dense:
        print(
            f"nanoquant: warning: {len(job.made_dense)} weights that the source holds quantized "
            "become BF16, because they are not served in int4 yet (routed experts, and modules "
            f"that no preset knows); the first is {printable(job.made_dense[0])}",
            file=sys.stderr,
        )
    done_before = job.is_done()
    if done_before:
        report = read_report(options.target)
        assert report is not None
    else:
        with progress("convert", job.source_bytes) as update:
            report = job.run(update)
    result = {"target": str(options.target), "done_before": done_before, **summary(report)}
    if options.json:
        print_json(result)
    else:
        print(_in_words(result, options.to))
    return OK


def _in_words(result: dict[str, Any], to: str) -> str:
    """What was done, for people."""
    taken_over = result["int4"] - result["requantized"]
    lines = []
    if result["done_before"]:
        lines.append(f"{result['target']} is complete already, from the same source")
    before, after = (megabytes(result["bytes"][when]) for when in ("before", "after"))
    lines.append(
        f"{result['target']}: {taken_over} weights taken over as they are, "
        f"{result['requantized']} quantized again; {before} became {after}"
    )
    if result["requantized"]:
        lines.append(
            f"quantizing again: mean relative error {result['mean_second_error']:.4f}, on top of "
            "the source's own"
        )
    if result["rounded_scales"]:
        lines.append(
            f"{result['rounded_scales']} scales were rounded to bf16, as vLLM does when it serves "
            f"them in bf16; the largest change is {result['largest_rounding']:.2%}"
        )
    plugin = "" if to == "nanoquant" else " (without the plugin as well)"
    lines.append(f"serve it with: vllm serve {result['target']}{plugin}")
    return "\n".join(lines)
