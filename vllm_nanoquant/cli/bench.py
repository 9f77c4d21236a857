# SPDX-License-Identifier: Apache-2.0
"""``nanoquant bench serve`` and ``nanoquant bench kernel``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_nanoquant.cli.output import (
    OK,
    add_command,
    add_json_option,
    check_device,
    print_json,
    print_table,
)

_EXAMPLES = """\
examples:
  nanoquant bench serve --output 3090.json --plot 3090.svg
  nanoquant bench serve --base-url http://gpu-box:8000 --concurrency 1,4 --prompt-tokens 2048
  nanoquant bench kernel --model nvidia/NVIDIA-Nemotron-Nano-9B-v2 --tokens 1,8,64
  nanoquant bench kernel --shape 4480x10240 --group-size 64
"""

_SERVE = """\
Measure how fast a running server decodes: the 10th, 50th and 90th percentile of tokens per second
over 20 runs of 128 tokens, after 3 that do not count, at each concurrency. The requests are made by
vLLM's own benchmark client.
"""
_SERVE_EXAMPLES = """\
examples:
  nanoquant bench serve
  nanoquant bench serve --concurrency 1 --runs 5 --output quick.json
"""

_KERNEL = """\
Time our op beside BF16's product, on shapes or on a model's layers, with the error of each. The
comparison with other int4 kernels is benchmarks/kernels/run.py of the repository.
"""
_KERNEL_EXAMPLES = """\
examples:
  nanoquant bench kernel
  nanoquant bench kernel --model ./nano-9b --tokens 1,2,4,8 --output kernels.json
"""
_DEFAULT_SHAPES = ("4480x10240", "15680x4480", "4480x15680")
"""Mamba's out_proj and the MLP of Nemotron-Nano-9B-v2."""


def add_to(commands: Any) -> None:
    """Add the command and its own commands to argparse's sub-parsers."""
    summary = "measure a running server, or the kernels"
    parser = add_command(commands, "bench", summary, "Measure speed on this machine.", _EXAMPLES)
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(parts)
    _add_kernel(parts)


def _add_serve(parts: Any) -> None:
    parser = add_command(
        parts, "serve", "decode speed of a running server", _SERVE, _SERVE_EXAMPLES
    )
    parser.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="address of the server (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="NAME", help="which of its models (default: the first)")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder or repository of the tokenizer (default: what the server loaded)",
    )
    parser.add_argument(
        "--concurrency",
        type=numbers_option,
        default=(1, 2, 4, 8),
        metavar="N,...",
        help="requests at once (default: 1,2,4,8)",
    )
    for name, default, text in (
        ("--runs", 20, "measured runs at each concurrency"),
        ("--warm-ups", 3, "runs before them that do not count"),
        ("--prompt-tokens", 128, "tokens of a prompt"),
        ("--output-tokens", 128, "tokens of an answer"),
    ):
        parser.add_argument(
            name,
            type=number_option,
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    _add_output(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the result: .svg, .png or .pdf"
    )
    parser.set_defaults(run=run_serve, after_interrupt="; nothing was written")


def _add_kernel(parts: Any) -> None:
    parser = add_command(parts, "kernel", "time our op beside BF16", _KERNEL, _KERNEL_EXAMPLES)
    parser.add_argument(
        "--shape",
        action="append",
        type=shape_option,
        metavar="NxK",
        help=f"output by input features; repeatable (default: {', '.join(_DEFAULT_SHAPES)})",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="the layers of this folder or model of the Hub instead"
    )
    parser.add_argument(
        "--tokens",
        type=numbers_option,
        default=(1, 8, 64, 512),
        metavar="N,...",
        help="numbers of tokens (default: 1,8,64,512)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        default=128,
        help="weights that share a scale (default: %(default)s)",
    )
    parser.add_argument(
        "--replays",
        type=number_option,
        default=20,
        metavar="N",
        help="how often a call is timed (default: %(default)s)",
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: the first GPU, if any)")
    _add_output(parser)
    parser.set_defaults(run=run_kernel, after_interrupt="; nothing was written")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the result there as JSON, whole or not"
    )
    add_json_option(parser)


def number_option(text: str) -> int:
    """A whole number from 1 on, for argparse.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or not 0 < int(text) < 10**7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def numbers_option(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, for argparse.

    Raises:
        argparse.ArgumentTypeError: anything else, or one of them twice.
    """
    numbers = tuple(number_option(part.strip()) for part in text.split(","))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
    return numbers


def shape_option(text: str) -> Any:
    """A shape, for argparse.

    Raises:
        argparse.ArgumentTypeError: not of the form NxK.
    """
    from vllm_nanoquant.bench.layers import parse_shape

    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_serve(options: argparse.Namespace) -> int:
    """Measure a running server.

    Raises:
        UsageError: no server, another model, a plot of unknown form, no folder for a file.
        BenchmarkError: the server or the client failed.
    """
    from vllm_nanoquant.bench import decoding
    from vllm_nanoquant.bench.plot import FORMS, HOW_TO_INSTALL, can_plot, plot
    from vllm_nanoquant.bench.server import find_model
    from vllm_nanoquant.checkpoint.errors import UsageError

    _check_files(options.output, options.plot)
    if options.plot is not None and options.plot.suffix not in FORMS:
        raise UsageError(f"--plot {options.plot}: must end in .svg, .png or .pdf")
    drawn = options.plot is not None and can_plot()
    if options.plot is not None and not drawn:
        print(f"nanoquant: no plot without matplotlib: {HOW_TO_INSTALL}", file=sys.stderr)
    model = find_model(options.base_url, options.model)
    load = decoding.Load(
        options.concurrency,
        options.runs,
        options.warm_ups,
        options.prompt_tokens,
        options.output_tokens,
    )
    load.check(model)
    tokenizer = model.tokenizer(options.tokenizer)
    print(f"nanoquant: measuring {model.name} at {model.url}", file=sys.stderr)
    results = decoding.measure(model, tokenizer, load, _tell_serve)
    conditions = decoding.conditions(model, tokenizer, load)
    result = {"what": decoding.WHAT, "conditions": conditions, "results": results}
    _finish(options, result, lambda: _serve_table(result))
    if drawn:
        plot(result, options.plot)
    return OK


def _tell_serve(row: Mapping[str, Any]) -> None:
    speed = row["decode_tokens_per_second"]["p50"]
    print(f"nanoquant: {row['concurrency']} at once: {speed} tokens/s each", file=sys.stderr)


def _serve_table(result: Mapping[str, Any]) -> None:
    head = ("at once", "requests", "p10", "p50", "p90", "all together", "ms to first token")
    rows = []
    for row in result["results"]:
        speed = row["decode_tokens_per_second"]
        figures = [speed["p10"], speed["p50"], speed["p90"], row["tokens_per_second"]]
        shown = [f"{figure:.1f}" for figure in (*figures, row["ms_to_first_token"]["p50"])]
        rows.append((str(row["concurrency"]), str(row["requests"]), *shown))
    print_table(head, rows)
    print("tokens per second, while decoding, of one request; prompts' time is in all together")


def run_kernel(options: argparse.Namespace) -> int:
    """Time the op.

    Raises:
        UsageError: a model or device that is not there, shapes beside a model, no folder for a
            file, or too little memory.
    """
    # Not at the top: these import torch.
    import torch

    from vllm_nanoquant.bench import kernel
    from vllm_nanoquant.bench.layers import layers_of, parse_shape
    from vllm_nanoquant.bench.surroundings import describe_machine, versions
    from vllm_nanoquant.checkpoint.errors import UsageError

    if options.model and options.shape:
        raise UsageError("--shape and --model: give one of them")
    _check_files(options.output)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    layers = options.shape or [parse_shape(shape) for shape in _DEFAULT_SHAPES]
    if options.model:
        layers = layers_of(options.model)
    on_cpu = device.type != "cuda"
    if on_cpu:
        print(f"nanoquant: {kernel.PLAIN_TORCH}", file=sys.stderr)
    rows: list[kernel.Row] = []
    for layer in layers:
        try:
            rows += kernel.measure_layer(
                layer, options.tokens, options.group_size, options.replays, device
            )
        except torch.OutOfMemoryError:
            raise UsageError(f"{layer.name} {layer.n}x{layer.k} does not fit on {name}") from None
    result = {
        "what": kernel.WHAT,
        "conditions": {
            "device": describe_machine(),
            "timed_on": name,
            "note": kernel.PLAIN_TORCH if on_cpu else "",
            "group_size": options.group_size,
            "replays": options.replays,
            "model": options.model,
            "layers": {f"{each.name} {each.n}x{each.k}": each.count for each in layers},
            "versions": versions(),
        },
        "results": [row.as_json() for row in rows],
    }
    _finish(options, result, lambda: _kernel_table(result))
    return OK


def _kernel_table(result: Mapping[str, Any]) -> None:
    head = ("layer", "N x K", "tokens", "of", "us", "error")
    rows = [
        (
            row["layer"],
            f"{row['n']} x {row['k']}",
            str(row["tokens"]),
            row["contestant"],
            f"{row['us']:.1f}",
            f"{row['error']:.1e}",
        )
        for row in result["results"]
    ]
    print_table(head, rows)


def _check_files(*paths: Path | None) -> None:
    """Refuse, before anything slow, files that could not be written in the end.

    Raises:
        UsageError: which, and why.
    """
    from vllm_nanoquant.checkpoint.errors import UsageError

    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")


def _finish(options: argparse.Namespace, result: dict[str, Any], tell: Callable[[], None]) -> None:
    from vllm_nanoquant.files import write_whole

    if options.output is not None:
        write_whole(options.output, json.dumps(result, indent=1) + "\n")
    if options.json:
        print_json(result)
    else:
        tell()
