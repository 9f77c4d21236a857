# SPDX-License-Identifier: Apache-2.0
"""``nanoquant plan MODEL``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_nanoquant.cli.output import (
    OK,
    PROBLEM,
    add_command,
    add_json_option,
    megabytes,
    print_json,
    print_table,
)
from vllm_nanoquant.cli.recipe_options import add_patterns, add_scheme

if TYPE_CHECKING:
    from vllm_nanoquant.planner.report import Variant
    from vllm_nanoquant.planner.settings import Settings
    from vllm_nanoquant.planner.source import Facts
    from vllm_nanoquant.planner.speed import Gpu
    from vllm_nanoquant.recipe import Recipe

_DESCRIPTION = """\
Say what a model needs of a GPU, and how many sequences of what length fit there. Needs no GPU and
no weights: config.json and the safetensors headers are read, of a model of the Hugging Face Hub
over the network. Speeds are predictions.
"""

_EXAMPLES = """\
examples:
  nanoquant plan nvidia/NVIDIA-Nemotron-Nano-9B-v2 --gpu-memory 24GiB
  nanoquant plan nvidia/NVIDIA-Nemotron-Nano-9B-v2 --gpu "RTX 3090" --preset full
  nanoquant plan ./nano-9b-int4 --gpu-memory 12GiB --max-model-len 32768
  nanoquant plan MODEL --gpu-memory 24564MiB --tensor-parallel-size 2 --json

exit status: 0 it fits by at least one of the presets planned; 1 it does not, or cannot be planned;
2 wrong usage
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands, "plan", "say what a model needs of a GPU", _DESCRIPTION, _EXAMPLES
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder, or model id of the Hugging Face Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model of the Hub")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="memory of each GPU as nvidia-smi tells it: 24GiB, 24GB, 24564MiB",
    )
    memory.add_argument("--gpu", metavar="NAME", help="a known GPU, such as 'RTX 3090'")
    recipe = parser.add_argument_group("recipe", "as 'nanoquant quantize' takes it")
    add_scheme(recipe, "ssm, balanced, quality or full (default: plan each)")
    add_patterns(recipe)
    _add_serving_options(parser.add_argument_group("serving", "options of vLLM"))
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt="")


def _add_serving_options(group: Any) -> None:
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    group.add_argument("--enable-expert-parallel", action="store_true")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="default: 0.9")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS")
    group.add_argument("--max-num-seqs", type=int, metavar="N")
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="TOKENS",
        help="default: 2048, from 70 GiB on 8192",
    )
    group.add_argument("--kv-cache-dtype", default="auto", metavar="DTYPE")
    group.add_argument(
        "--mamba-ssm-cache-dtype", default="auto", metavar="DTYPE", help="auto is Nemotron-H's"
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="default: as the vLLM installed here, or the newest, has it",
    )


def run(options: argparse.Namespace) -> int:
    """Carry the command out; 1 where nothing fits.

    Raises:
        UsageError, CheckpointError, RecipeError: as `planner.source.read_facts` and
            `planner.report.variants_of`; PlanError where nothing fits, after the tables.
    """
    # Not at the top: these import torch.
    from vllm_nanoquant.planner.errors import PlanError
    from vllm_nanoquant.planner.report import recipes_of, variants_of
    from vllm_nanoquant.planner.source import read_facts
    from vllm_nanoquant.planner.speed import GPUS, known_gpu

    settings = _settings(options)
    recipe = _recipe(options)
    facts = read_facts(options.model, options.revision)
    variants, reasons = variants_of(facts, recipes_of(facts, recipe, options.preset), settings)
    fits = any(variant.limits for variant in variants)
    if options.json:
        print_json(
            {
                "model": facts.name,
                "shapes_from": facts.shapes_from,
                "fits": fits,
                "kind": "memory planned, speed predicted; nothing here was measured",
                "gpu_memory": settings.gpu_memory,
                "tensor_parallel_size": settings.ranks.count,
                "prefix_caching": settings.caching.on,
                "variants": [variant.as_json() for variant in variants],
                "not_planned": reasons,
            }
        )
        return OK if fits else PROBLEM
    gpus = GPUS if options.gpu is None else (known_gpu(options.gpu),)
    _print_plan(facts, settings, variants, gpus)
    for name, reason in reasons.items():
        print(f"\n{name}: not planned: {reason}")
    if not fits:
        print(flush=True)
        raise PlanError(variants[-1].why)
    return OK


def _settings(options: argparse.Namespace) -> Settings:
    from vllm_nanoquant.planner.numbers import parse_memory
    from vllm_nanoquant.planner.settings import (
        UTILIZATION,
        Settings,
        caching_of,
        installed_vllm,
    )
    from vllm_nanoquant.planner.speed import known_gpu
    from vllm_nanoquant.planner.weights import Ranks

    memory = known_gpu(options.gpu).memory if options.gpu else parse_memory(options.gpu_memory)
    share = options.gpu_memory_utilization
    return Settings(
        gpu_memory=memory,
        ranks=Ranks(options.tensor_parallel_size, options.enable_expert_parallel),
        gpu_memory_utilization=UTILIZATION if share is None else share,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_dtype=options.kv_cache_dtype,
        mamba_ssm_cache_dtype=options.mamba_ssm_cache_dtype,
        max_num_batched_tokens=options.max_num_batched_tokens,
        prefixes=caching_of(installed_vllm(), options.enable_prefix_caching),
    )


def _recipe(options: argparse.Namespace) -> Recipe:
    from vllm_nanoquant.recipe import Recipe

    given = {"preset": options.preset, "group_size": options.group_size}
    chosen = {key: value for key, value in given.items() if value is not None}
    return Recipe.parse({**chosen, "ignore": options.ignore, "overrides": dict(options.override)})


def _print_plan(
    facts: Facts, settings: Settings, variants: Sequence[Variant], gpus: Sequence[Gpu]
) -> None:
    from vllm_nanoquant.planner.numbers import gib
    from vllm_nanoquant.planner.source import HEADERS

    unread = "" if facts.shapes_from == HEADERS else ", no safetensors headers could be read"
    print(f"{facts.name}: shapes from {facts.shapes_from}{unread}")
    ranks = settings.ranks.count
    spread = "" if ranks == 1 else f"{ranks} GPUs, and sizes are those of one of them; "
    print(
        f"{spread}{gib(settings.gpu_memory)} each, of which vLLM may use {gib(settings.budget)} "
        f"(--gpu-memory-utilization {settings.gpu_memory_utilization:g})"
    )
    for variant in variants:
        print()
        _print_parts(variant)
    print()
    _print_memory(settings, variants)
    print()
    _print_limits(settings, variants)
    print()
    _print_speeds(settings, variants, gpus)


def _print_parts(variant: Variant) -> None:
    """The table by layer type."""
    rows = [
        (
            row.part,
            str(row.modules or ""),
            f"{row.parameters / 1e6:,.2f} M" if row.parameters else "",
            megabytes(row.bf16_bytes) if row.bf16_bytes else "",
            megabytes(row.bytes) if row.bytes else "",
            megabytes(row.read_bytes),
        )
        for row in variant.rows
    ]
    head = (variant.name, "modules", "parameters", "BF16", "served", "read per token")
    print_table(head, rows)


def _print_memory(settings: Settings, variants: Sequence[Variant]) -> None:
    """What fills a GPU, in GiB, a column for each recipe."""
    from vllm_nanoquant.planner.numbers import GIB

    needs = [variant.found.needs for variant in variants]
    lines = {
        "weights": [each.weights for each in needs],
        "rounding of torch's allocator": [each.rounding for each in needs],
        "scratch of the kernels": [each.scratch for each in needs],
        f"activations, {settings.tokens} tokens": [each.activations for each in needs],
        "CUDA" if settings.ranks.count == 1 else "CUDA and NCCL": [each.outside for each in needs],
        "CUDA graphs": [each.graphs for each in needs],
        "left for the cache": [variant.found.cache_bytes for variant in variants],
    }
    print_table(
        ("GiB of a GPU", "", *(variant.name for variant in variants)),
        [(name, "", *(f"{value / GIB:.2f}" for value in values)) for name, values in lines.items()],
    )


def _print_limits(settings: Settings, variants: Sequence[Variant]) -> None:
    """The cache, and how many sequences of what length fit."""
    from vllm_nanoquant.planner.report import SEQUENCES

    cache, caching = variants[0].found.cache, settings.caching
    states = "on" if caching.on else "off"
    print(
        f"cache: {cache.token_bytes:,} bytes of keys and values per token, {cache.state_bytes:,} "
        f"bytes of Mamba states per sequence;\nblocks of {cache.block_tokens} tokens or one state, "
        f"{megabytes(cache.block_bytes)} each; prefix caching {states}"
    )
    if cache.mamba_groups:
        each = "one state for every block of tokens" if cache.states is None else cache.states
        print(f"a sequence takes {cache.mamba_groups} x {each} blocks for its states")
    print()
    rows = [
        ("--max-model-len", f"--max-num-seqs {count}", *(_tokens(v, count) for v in variants))
        for count in SEQUENCES
    ]
    length = variants[0].found.model_len
    rows.append(
        (
            "--max-num-seqs",
            f"--max-model-len {length}",
            *(str(v.found.sequences(length)) for v in variants),
        )
    )
    print_table(("largest", "with", *(v.name for v in variants)), rows)
    for variant in variants:
        if (limits := variant.limits) is not None:
            print(
                f"{variant.name}: --max-model-len {limits.max_model_len} --max-num-seqs "
                f"{limits.max_num_seqs} --gpu-memory-utilization "
                f"{limits.gpu_memory_utilization:g}"
            )
        else:
            print(f"{variant.name}: does not fit")


def _tokens(variant: Variant, count: int) -> str:
    return str(variant.found.longest(count) or "none")


def _print_speeds(settings: Settings, variants: Sequence[Variant], gpus: Sequence[Gpu]) -> None:
    """Predicted tokens per second, a line for each GPU and batch."""
    from vllm_nanoquant.planner.report import BATCHES

    ranks = settings.ranks.count
    print("predicted, not measured: tokens/s of decoding short contexts, all sequences together")
    if ranks > 1:
        print(f"on {ranks} GPUs linked by NVLink; over PCIe it is less")
    rows = [
        (
            gpu.name,
            f"batch {batch}",
            *(f"{variant.speeds[gpu.name][batch]:.0f}" for variant in variants),
        )
        for gpu in gpus
        for batch in BATCHES
    ]
    print_table(("GPU", "", *(variant.name for variant in variants)), rows)
