# SPDX-License-Identifier: Apache-2.0
"""Write docs/evidence.md and its plots out of the result files.

    python benchmarks/evidence/page.py

It needs matplotlib for the plots; --no-plots does without.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script

from benchmarks.evidence import speed, tables  # noqa: E402
from benchmarks.evidence.findings import against_the_tool, findings  # noqa: E402
from benchmarks.evidence.plots import save_all  # noqa: E402
from vllm_nanoquant.files import write_whole  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = RESULTS / "small-evidence.json"
TRAINING = RESULTS / "small-training.json"
TOOL = RESULTS / "small-llm-compressor.json"
CONTEST = ROOT / "benchmarks" / "end_to_end" / "results" / "h200-nano9b-contest.json"

_PAGE = """\
<!-- Written by benchmarks/evidence/page.py: change that, or the result files. -->
# Evidence

What int4 costs, measured on a Nemotron-H model of {parameters:.0f} million parameters that was
trained for it: small enough to be trained in minutes and measured in every way, and a language
model. It has the 9B's kinds of layers in its proportions and its ragged groups (the MLP's inner
width is 17.5 groups of 128, the 9B's 122.5). It is no 9B: there the same rounding may cost more or
less, and other kinds of weight the most. Real checkpoints are measured with
[`nanoquant eval`](evaluation.md).

## What follows from the figures

KL divergence is from BF16, in thousandths of a nat of a token.

{findings}

## What was done about it

- `balanced` stays the default preset. The LM head, which only `full` quantizes, costs more than any
  other kind of weight, for a ninth of the weights here.
- `mse` is the default everywhere now: of `nanoquant quantize` and `convert`, as before, and while
  vLLM loads, where a kernel of its own does the search in 0.35 s for a 9B
  ([loading](benchmarks.md#loading)). `gptq` is the advice where there is a text:
  [algorithms](algorithms.md).
- Groups of 128 and zero points in bf16 stay the default: whole ones save 0.1 bits of a weight, and
  lose much of what groups of 64 gain for 0.25.
- `quality` stays NVIDIA's choice, which was made on the models that it is for. Here it pays off, as
  does leaving out as many weights at the start; out_proj is the better buy where more memory can
  be spent: `ignore` and `overrides` of the [recipe](presets.md#exceptions) take patterns.

## Speed beside quality

Perplexity over BF16's, of the small model; GiB and tokens per second of all sequences together, of
Nemotron-Nano-9B-v2's geometry with dummy weights: measured with vLLM {vllm}
([benchmarks](benchmarks.md), with vLLM's own int4 and FP8), and as [the planner](planning.md)
predicts them for an RTX 3090. None was measured there by this project.

{speed}

On an RTX 3090 the original of this idea, redhelix/nanoquant, reports 44.8 tokens/s for BF16 and
51.0 for its int4, at batch 1.

## How it was measured

- Text: {windows} windows of {window} tokens out of pages that training never saw, and
  {long_windows} long documents of {long_window} tokens. A page that shares more than a tenth of its
  runs of eight words with training text is left out.
- Arithmetic: {arithmetic}. Weights are compared, no kernels. BF16 is the checkpoint as it is.
- Ours: the package's quantizers and recipes. GPTQ sees {sequences} sequences of {tokens} tokens of
  training text, except where the table says otherwise.
- `*-int`: our scales, with zero points rounded to whole numbers.
- Simulated after their definitions, not made by their tools: llm-compressor's round to nearest,
  mse observer and GPTQ (`rtn-*`, `mse-sym`, `gptq-*sym`), and FP8 (`fp8`: e4m3, a scale for each
  row; `fp8-w8a8`: the inputs of each token as well). llm-compressor itself refuses groups that do
  not divide a row; here the last one is shorter.
- `linears`: preset `full` without the LM head, which is what llm-compressor's recipe covers.
- KL: divergence of the next-token distribution from BF16's, of a token. Agreement: both find the
  same token the likeliest. Bits: of an int4 weight, scales and zero points included.
- ±: one standard error, by bootstrap over windows, of differences from BF16 in the same window.
- {device}, torch {torch}.

```sh
python tools/prepare_small_corpus.py --out build/small-corpus
python tools/train_small_model.py --data build/small-corpus --out build/small-nemotron-h \\
    --work build/small-training --report benchmarks/results/small-training.json --minutes 8
python benchmarks/evidence/run.py --model build/small-nemotron-h --data build/small-corpus \\
    --output benchmarks/results/small-evidence.json
python benchmarks/evidence/page.py
```

## The model

{training}

![Held-out perplexity against training tokens](images/evidence-curve.svg)

Text and licence: [tools/small_model/README.md](../tools/small_model/README.md).

## Presets and algorithms

{presets}

## Group sizes

{groups}

## Zero points: float and whole

{zeros}

## Beside llm-compressor's methods and FP8

{peers}

![Bits of a weight against KL divergence](images/evidence-bits.svg)

## Beside llm-compressor itself

Checkpoints that llm-compressor {tool} made of this model, and ours of the same modules with the
same {tool_sequences} calibration sequences of {tool_tokens} tokens, scored alike over the first
{tool_windows} windows, on a CPU ({tool_device}). Its groups must divide every row; 32 does. Cases
of the same name in other tables saw all windows, and more sequences. `*-gptq-sym` and `*-asym` have
ranges by its mse observer, `*-minmax-*` its default ones.

{tool_table}

{tool_findings}

```sh
python -m venv llmc && llmc/bin/pip install llmcompressor=={tool} tokenizers -e .
python benchmarks/evidence/llm_compressor.py --model build/small-nemotron-h \\
    --data build/small-corpus --write-ids build/calibration.npy
llmc/bin/python benchmarks/quality/llm_compressor.py build/small-nemotron-h build/llmc-g32 \\
    --calibration-ids build/calibration.npy --group-size 32
python benchmarks/evidence/llm_compressor.py --model build/small-nemotron-h \\
    --data build/small-corpus --folders build/llmc-g32 \\
    --output benchmarks/results/small-llm-compressor.json
```

## One kind of weight at a time

{kinds}

![KL divergence of each kind of weight alone](images/evidence-kinds.svg)

## Layers left in BF16

Preset `balanced` less some layers. The table of presets has `balanced` whole, and `quality`.

{left_out}

## Long context

KL divergence, 10^-3 nats, by the position in the document: an error that a recurrent state keeps
would grow from left to right.

{positions}

![KL divergence against position](images/evidence-positions.svg)

## Calibration

Other calibration text (seeds), and less or more of it.

{calibration}
"""
_LAYERS = """
## Each layer alone

{layers}
"""


Report = dict[str, Any]
# What tells the file of each option from those of the others.
_KEYS = {
    "evidence": ("problem", "machine", "results"),
    "training": ("options", "heldout", "curve"),
    "contest": ("device", "packages", "results"),
    "tool": ("problem", "machine", "packages", "results"),
}


def page(evidence: Report, training: Report, contest: Report, tool: Report) -> str:
    """The page's text."""
    results, problem = evidence["results"], evidence["problem"]
    sections = {
        section.replace("-", "_"): tables.table(tables.section_rows(results, section))
        for section in tables.SECTIONS
    }
    text = _PAGE
    if any(row["section"] == "layers" for row in results.values()):
        text += _LAYERS
    return text.format(
        parameters=problem["parameters"] / 1e6,
        findings="\n".join(f"- {sentence}" for sentence in findings(results)),
        training=tables.table(tables.training_rows(training)),
        positions=tables.table(tables.position_rows(results)),
        speed=tables.table(speed.rows(results, contest)),
        vllm=contest["packages"]["vllm"],
        tool=tool["packages"]["llmcompressor"],
        tool_sequences=tool["problem"]["calibration"]["sequences"],
        tool_tokens=tool["problem"]["calibration"]["tokens"],
        tool_windows=tool["problem"]["windows"],
        tool_device=tool["machine"]["device"],
        tool_table=tables.table(tables.section_rows(tool["results"], "llm-compressor")),
        tool_findings="\n".join(f"- {one}" for one in against_the_tool(tool["results"])),
        windows=problem["windows"],
        window=problem["window"],
        long_windows=problem["long_windows"],
        long_window=problem["long_window"],
        arithmetic=problem["arithmetic"],
        **problem["calibration"],
        **{key: evidence["machine"][key] for key in ("device", "torch")},
        **sections,
    )


def _read(path: Path, keys: tuple[str, ...]) -> Report:
    """A result file.

    Raises:
        ValueError: it is that of another script; the message names it.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    for key in keys:
        if not isinstance(report, dict) or key not in report:
            raise ValueError(f"{path} is another script's result: it has no {key!r}")
    if not isinstance(report.get("results", {}), dict):
        raise ValueError(f"{path} is another script's result: its results have no names")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="JSON file of run.py")
    parser.add_argument("--training", type=Path, default=TRAINING, help="JSON of the training")
    parser.add_argument("--contest", type=Path, default=CONTEST, help="JSON of end_to_end/run.py")
    parser.add_argument("--tool", type=Path, default=TOOL, help="JSON of llm_compressor.py")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write in")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if not options.docs.is_dir():
        parser.error(f"there is no folder {options.docs}: --docs is where the page goes")
    try:
        evidence, training, contest, tool = (
            _read(getattr(options, name), keys) for name, keys in _KEYS.items()
        )
        text = page(evidence, training, contest, tool)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except (AttributeError, LookupError, TypeError) as error:
        files = ", ".join(str(getattr(options, name)) for name in _KEYS)
        parser.error(f"no page can be made of {files}: {error!r}")
    write_whole(options.docs / "evidence.md", text)
    if options.plots:
        try:
            save_all(evidence["results"], training, options.docs / "images")
        except ModuleNotFoundError as error:
            parser.error(f"plots need matplotlib: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
