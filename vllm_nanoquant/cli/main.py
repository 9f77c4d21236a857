# SPDX-License-Identifier: Apache-2.0
"""``nanoquant``: quantize, convert, verify, inspect and describe checkpoints.

Importing this is quick: a command imports torch when it runs, not when its options are read.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_nanoquant import __version__
from vllm_nanoquant.cli import card, convert, inspect, quantize, verify
from vllm_nanoquant.cli.output import OK, PROBLEM, USAGE

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""

_COMMANDS = (quantize, convert, verify, inspect, card)

_EXAMPLES = """\
examples:
  nanoquant quantize nvidia/NVIDIA-Nemotron-Nano-9B-v2 nano-9b-int4
  vllm serve nano-9b-int4

  nanoquant verify nano-9b-int4
  nanoquant inspect nano-9b-int4

exit status: 0 all is well; 1 a problem was found; 2 wrong usage; 130 interrupted
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="nanoquant",
        description="int4 checkpoints for vLLM: made, checked and described.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nanoquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: without the program's name; None takes those of the process.

    Raises:
        SystemExit: by argparse, for ``--help``, ``--version`` and options that it refuses.
    """
    options = make_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        # Here, and not at exit, so that a closed pipe is noticed where it can be dealt with.
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\nnanoquant: interrupted{options.after_interrupt}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` say, has seen enough. The interpreter flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"nanoquant: error: {place}{error.strerror or error}", file=sys.stderr)
        return PROBLEM
    except ValueError as error:
        # Not at the top: pydantic, which recipes are made of, takes a while to import.
        from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
        from vllm_nanoquant.recipe import RecipeError

        if not isinstance(error, CheckpointError | RecipeError):
            raise
        print(f"nanoquant: error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError | RecipeError) else PROBLEM


if __name__ == "__main__":
    sys.exit(main())
