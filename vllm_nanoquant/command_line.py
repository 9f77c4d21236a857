# SPDX-License-Identifier: Apache-2.0
"""Options of ours on a vLLM command line that cannot carry them, caught before vLLM parses it.

vLLM's own message for these would not say which flag is right, and our config class is not asked
until much later.
"""

import sys
from collections.abc import Sequence

from vllm_nanoquant.recipe import METHOD, ServingOptions

_QUANTIZATION_FLAGS = ("--quantization", "-q")
RIGHT_FLAG = "--hf-overrides.quantization_config"
"""The flag that carries our options, one key each: ``RIGHT_FLAG.preset full``."""


def misplaced_flag(arguments: Sequence[str]) -> str | None:
    """The first flag that gives our options to the wrong place, or None.

    Args:
        arguments: a command line, as ``sys.argv``. One that does not ask for our method by
            ``--quantization`` is none of our business.
    """
    if not _asks_for_our_method(arguments):
        return None
    wrong = {"--quantization-config", "--quantization_config"}
    for option in ServingOptions.model_fields:
        wrong |= {f"--{option}", f"--{option.replace('_', '-')}"}
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag in wrong or flag.startswith(("--quantization-config.", "--quantization_config.")):
            return flag
    return None


def refuse_misplaced_flags(arguments: Sequence[str]) -> None:
    """End the process with one clear line when ``misplaced_flag`` finds something.

    Raises:
        SystemExit: status 2, as argparse does for wrong arguments.
    """
    flag = misplaced_flag(arguments)
    if flag is None:
        return
    option = flag.removeprefix("--").replace("-", "_")
    example = option if option in ServingOptions.model_fields else "group_size"
    print(
        f"error: {flag} does not reach {METHOD}; give its options to {RIGHT_FLAG}, "
        f"e.g. {RIGHT_FLAG}.{example} VALUE",
        file=sys.stderr,
    )
    raise SystemExit(2)


def _asks_for_our_method(arguments: Sequence[str]) -> bool:
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        (argument in _QUANTIZATION_FLAGS and following == METHOD)
        or argument in {f"{flag}={METHOD}" for flag in _QUANTIZATION_FLAGS}
        for argument, following in pairs
    )
