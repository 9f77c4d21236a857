# SPDX-License-Identifier: Apache-2.0
"""``nanoquant serve MODEL``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from vllm_nanoquant.cli.output import OK, add_command
from vllm_nanoquant.cli.recipe_options import add_scheme

if TYPE_CHECKING:
    from vllm_nanoquant.launch.machine import Machine

_DESCRIPTION = """\
Run `vllm serve MODEL` with what the user left out: --quantization (unless the checkpoint is int4 in
our format), --max-model-len and --max-num-seqs that fit the GPU's memory, float32 for the states of
Mamba layers, and the parsers for tool calls and reasoning that the model's chat template asks for.
Every other option goes to vLLM as it is, and none that is given is touched. The whole line is
printed before vLLM starts, so that it can be copied.
"""

_EXAMPLES = """\
examples:
  nanoquant serve nvidia/NVIDIA-Nemotron-Nano-9B-v2
  nanoquant serve nvidia/NVIDIA-Nemotron-Nano-9B-v2 --preset full --max-model-len 16384
  nanoquant serve nano-9b-int4 --max-num-seqs 4 --port 8001
  nanoquant serve nvidia/NVIDIA-Nemotron-Nano-9B-v2 --gpu-memory 24GiB --dry-run

options of vLLM come after MODEL; vllm serve --help=all lists them
"""

_MANY = 1024
"""More GPUs than anybody has: --gpu-memory is said of each."""
_OWN = ("preset", "group_size", "algorithm", "max_capture_size")


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = add_command(
        commands,
        "serve",
        "run vllm serve with what a model of this family needs",
        _DESCRIPTION,
        _EXAMPLES,
    )
    parser.usage = "nanoquant serve MODEL [options of vLLM] [options]"
    # Else --max would be taken for one of these options, and not for one of vLLM's.
    parser.allow_abbrev = False
    recipe = parser.add_argument_group(
        "recipe", "short for --hf-overrides.quantization_config.NAME; the README lists the others"
    )
    add_scheme(recipe)
    recipe.add_argument("--algorithm", help="mse (default) or minmax, less exact")
    recipe.add_argument(
        "--max-capture-size",
        type=int,
        metavar="N",
        help="largest batch with a CUDA graph (default: 8)",
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="memory of each GPU, as 24GiB, instead of what the GPUs here have",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the line and start nothing")
    parser.set_defaults(run=run, after_interrupt="", takes_more=True)


def run(options: argparse.Namespace) -> int:
    """Print the line and become vLLM; return only from a dry run.

    Raises:
        UsageError, RecipeError, CheckpointError, PlanError: as the parts of `launch`.
    """
    # Not at the top: reading options is quick.
    from vllm_nanoquant.launch.additions import Request, find_additions
    from vllm_nanoquant.launch.command import require_vllm, server_command
    from vllm_nanoquant.launch.given import Given
    from vllm_nanoquant.launch.machine import find_machine
    from vllm_nanoquant.launch.model import read_facts

    given = Given.parse(options.more)
    if not options.dry_run:
        require_vllm()
        _refuse_bytecode_hook()
    facts = read_facts(given)
    own = {name: getattr(options, name) for name in _OWN if getattr(options, name) is not None}
    machine = find_machine() if options.gpu_memory is None else _machine_of(options.gpu_memory)
    additions = find_additions(Request(given, own, facts, machine, _suggest_limits))
    command = server_command(given, [word for each in additions for word in each.words])
    for each in additions:
        print(f"nanoquant: {shlex.join(each.words)}  ({each.why})", file=sys.stderr)
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return OK
    sys.stderr.flush()
    # Not a child: signals and the exit status are then vLLM's own.
    os.execvp(command[0], command)


def _machine_of(memory: str) -> Machine:
    # Not at the top: the planner imports torch.
    from vllm_nanoquant.launch.machine import Machine
    from vllm_nanoquant.planner.numbers import parse_memory

    return Machine((parse_memory(memory),) * _MANY)


def _suggest_limits(*arguments: Any, **options: Any) -> Any:
    # Not at the top: not needed where the user gave both limits, or where there is no GPU.
    from vllm_nanoquant.planner import PlanError, suggest_limits

    try:
        return suggest_limits(*arguments, **options)
    except PlanError as error:
        raise PlanError(
            f"{error}. Nothing is planned if --max-model-len and --max-num-seqs are given"
        ) from None


def _refuse_bytecode_hook() -> None:
    """As the plugin does, but before vLLM is imported."""
    from vllm_nanoquant.checkpoint.errors import UsageError
    from vllm_nanoquant.recipe import METHOD
    from vllm_nanoquant.requirements import why_not_under

    reason = why_not_under(os.environ)
    if reason is not None:
        raise UsageError(f"{METHOD} {reason}")
