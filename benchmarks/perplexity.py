# SPDX-License-Identifier: Apache-2.0
"""What each preset costs on the shipped model: perplexity of its held-out text, and greedy text.

    python benchmarks/perplexity.py --output benchmarks/results/tiny-perplexity.json

Each preset is served by vLLM and scores the whole held-out text in non-overlapping windows, each
token but the first of a window given the ones before it. Perplexity is exp of the mean negative log
likelihood per token.
"""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the engines of the tests are the ones to measure

from benchmarks.common import VLLM, output_file, versions, write_json  # noqa: E402
from tests.serving.engines import (  # noqa: E402
    PROMPTS,
    heldout_windows,
    job,
    perplexity,
    run_engines,
)
from vllm_nanoquant.recipe import Recipe  # noqa: E402

MODEL = ROOT / "models" / "tiny-nemotron-h"
RECIPES = {
    "bf16": None,
    **{preset: {"preset": preset} for preset in ("ssm", "balanced", "quality", "full")},
    **{f"balanced, group size {g}": {"group_size": g} for g in (32, 64)},
    **{
        f"{preset}, minmax": {"preset": preset, "algorithm": "minmax"}
        for preset in ("balanced", "full")
    },
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    arguments = parser.parse_args()
    # Before the engines run: what fails here must not cost their results.
    packages = versions(("torch", *VLLM, "vllm-nanoquant"))
    windows = heldout_windows(MODEL, arguments.window, sys.maxsize)
    engine = {"max_model_len": arguments.window + 8}
    jobs = [
        job(name, MODEL, recipe, windows=windows, engine=dict(engine))
        for name, recipe in RECIPES.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        reports = run_engines(jobs, Path(folder), timeout=3600)
    results = {}
    for name, report in reports.items():
        if "error" in report:
            sys.exit(f"{name} was not served: {report['error']}")
        found = perplexity(report)
        results[name] = {
            "perplexity": found,
            "tokens": report["nll_tokens"],
            "greedy": dict(zip(PROMPTS, report["texts"], strict=True)),
        }
        over = found / results["bf16"]["perplexity"] - 1
        print(f"{name:24} {found:8.3f} {100 * over:+6.2f} %")
    report_json = {
        "problem": {
            "model": MODEL.name,
            "text": "heldout.txt",
            "window": arguments.window,
            "algorithm": f"{Recipe().algorithm}, where no other is named",
        },
        "device": platform.processor() or platform.machine(),
        "packages": packages,
        "results": results,
    }
    write_json(arguments.output, report_json)


if __name__ == "__main__":
    main()
