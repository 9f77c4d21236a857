# SPDX-License-Identifier: Apache-2.0
"""What a `vllm serve` line lacks for a model of this family. What the user gave is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_nanoquant.checkpoint.errors import UsageError, printable
from vllm_nanoquant.command_line import RIGHT_FLAG
from vllm_nanoquant.launch.given import Given
from vllm_nanoquant.launch.machine import Machine
from vllm_nanoquant.launch.model import ModelFacts
from vllm_nanoquant.plugin import PARSERS
from vllm_nanoquant.recipe import METHOD, Recipe

_OVERRIDES = "--hf-overrides"
_STATES = "--mamba-ssm-cache-dtype"
_LENGTH, _SEQUENCES, _SHARE = "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization"
_DEFAULT_SHARE = 0.9
_AUTOMATIC = ("auto", "-1")
# Options by which the user has taken the memory, or its division over GPUs, into their own hands.
_OWN_MEMORY = ("--kv-cache-memory-bytes", "--cpu-offload-gb", "--pipeline-parallel-size")
# What a chat template of each model has in it, and the parsers for tool calls and for reasoning.
_PARSERS = (("<TOOLCALL>", PARSERS, PARSERS), ("<function=", "qwen3_coder", "nemotron_v3"))
_THINKS = "<think>"
_MULTIPLES = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}


@dataclass(frozen=True)
class Addition:
    """Words to add to the line, and why."""

    words: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Request:
    """Everything that the decision depends on.

    Attributes:
        given: the user's line.
        own: options of ours in their short form, by their names in a recipe.
        facts: what the model says of itself.
        machine: what it will run on.
        plan: `planner.suggest_limits`.
    """

    given: Given
    own: dict[str, Any]
    facts: ModelFacts
    machine: Machine
    plan: Callable[..., Any]


def find_additions(request: Request) -> list[Addition]:
    """Decide what to add, in the order of the line.

    Raises:
        UsageError: options that exclude each other, or a checkpoint that nanoquant cannot read.
        RecipeError: an option of ours with an impossible value.
        PlanError: the model does not fit.
    """
    return [
        *_method(request),
        *_recipe_words(request),
        *_limits(request),
        *_states(request),
        *_prefix_caching(request),
        *_parsers(request),
    ]


def _method(request: Request) -> Iterator[Addition]:
    if request.given.has("--quantization"):
        return
    written = request.facts.quantization
    method = written.get("quant_method", METHOD) if written else None
    if method == METHOD:
        return
    if method is not None:
        # Not at the top: it imports torch.
        from vllm_nanoquant.inventory import READABLE_METHODS

        if method not in READABLE_METHODS:
            raise UsageError(
                f"{printable(request.given.model_name)} is quantized by "
                f"{printable(str(method))!r}, which nanoquant does not read; serve it with "
                "vllm serve, or take the model that it was made from"
            )
        why = f"the checkpoint's {method} weights through nanoquant's kernels"
        yield Addition(("--quantization", METHOD), why)
        return
    yield Addition(("--quantization", METHOD), "int4, quantized while the model loads")


def _recipe_words(request: Request) -> Iterator[Addition]:
    """Our own options in the form that reaches the plugin through vLLM."""
    written = _given_recipe(request.given)
    if request.own or written:
        _recipe(request)  # so that a wrong option is an error before vLLM is imported
    if not request.own:
        return
    if request.given.has_whole(_OVERRIDES):
        first = next(iter(request.own))
        raise UsageError(
            f"--{_dashes(first)} and {_OVERRIDES} cannot be given together: one would replace the "
            f'other; put {{"quantization_config": {{"{first}": ...}}}} into {_OVERRIDES}'
        )
    for name, value in request.own.items():
        if name in written:
            raise UsageError(f"--{_dashes(name)} is given twice, also as {RIGHT_FLAG}.{name}")
        words = (f"{RIGHT_FLAG}.{name}", str(value))
        yield Addition(words, f"what --{_dashes(name)} is short for")


def _dashes(name: str) -> str:
    return name.replace("_", "-")


def _given_recipe(given: Given) -> dict[str, Any]:
    found = given.mapping(_OVERRIDES).get("quantization_config")
    return dict(found) if isinstance(found, dict) else {}


def _recipe(request: Request) -> Recipe:
    """The recipe in force: the checkpoint's own, with what the user gave."""
    # Not at the top: it imports torch.
    from vllm_nanoquant.inventory import parse_options

    written = request.facts.quantization or {}
    carried = written if written.get("quant_method", METHOD) == METHOD else {}
    return parse_options({**carried, **_given_recipe(request.given), **request.own}).options


def _limits(request: Request) -> Iterator[Addition]:
    given = request.given
    ranks = _number(given.value("--tensor-parallel-size")) or 1
    memory = request.machine.memory(ranks)
    if memory is None or not _is_ours_to_plan(request):
        return
    length, sequences = _number(given.value(_LENGTH)), _number(given.value(_SEQUENCES))
    limits = request.plan(
        given.model_name,
        _recipe(request),
        gpu_memory=memory,
        tensor_parallel_size=ranks,
        gpu_memory_utilization=_share(given),
        max_model_len=length,
        max_num_seqs=sequences,
        kv_cache_dtype=str(given.value("--kv-cache-dtype") or "auto"),
        mamba_ssm_cache_dtype=str(given.value(_STATES) or request.facts.state_dtype or "float32"),
    )
    chosen = {
        _LENGTH: limits.max_model_len,
        _SEQUENCES: limits.max_num_seqs,
        _SHARE: limits.gpu_memory_utilization,
    }
    words = [(name, str(value)) for name, value in chosen.items() if not given.has(name)]
    gpus = f"{ranks} x " if ranks > 1 else ""
    why = f"planned for {gpus}{memory / 2**30:.1f} GiB: nanoquant plan {given.model_name}"
    yield Addition(tuple(word for pair in words for word in pair), why)


def _is_ours_to_plan(request: Request) -> bool:
    given = request.given
    if request.facts.config is None or (given.has(_LENGTH) and given.has(_SEQUENCES)):
        return False
    method = given.value("--quantization")
    return method in (None, METHOD) and not any(given.has(name) for name in _OWN_MEMORY)


def _share(given: Given) -> float:
    value = given.value(_SHARE)
    try:
        return float(value) if value is not None else _DEFAULT_SHARE
    except (TypeError, ValueError):
        return _DEFAULT_SHARE  # vLLM will say what is wrong with it


def _number(value: Any) -> int | None:
    """A number as vLLM reads it (8192, 8k, 8K); None for what is left to vLLM, or is none."""
    text = str(value)
    multiple = _MULTIPLES.get(text[-1:], 1)
    try:
        return int(float(text.rstrip("kmKM")) * multiple) if text not in _AUTOMATIC else None
    except (ValueError, OverflowError):
        return None


def _states(request: Request) -> Iterator[Addition]:
    facts = request.facts
    if not facts.has_mamba or request.given.has(_STATES):
        return
    if facts.state_dtype in (None, "auto", "float32"):
        yield Addition((_STATES, "float32"), "the state of a Mamba layer adds up every token")


def _prefix_caching(request: Request) -> Iterator[Addition]:
    cached = request.given.has("--enable-prefix-caching")
    if request.machine.is_cpu and request.facts.has_mamba and not cached:
        why = "vLLM's CPU build fails with it on longer prompts of Mamba models"
        yield Addition(("--no-enable-prefix-caching",), why)


def _parsers(request: Request) -> Iterator[Addition]:
    given, template = request.given, request.facts.template
    if request.facts.text_config.get("model_type") != "nemotron_h":
        return
    for sign, tools, reasoning in _PARSERS:
        if sign not in template:
            continue
        words: list[str] = []
        if not given.has("--tool-call-parser") and not given.has("--no-enable-auto-tool-choice"):
            if not given.has("--enable-auto-tool-choice"):
                words.append("--enable-auto-tool-choice")
            words += ["--tool-call-parser", tools]
        if _THINKS in template and not _has_reasoning_parser(given):
            words += ["--reasoning-parser", reasoning]
        if words:
            yield Addition(tuple(words), f"the chat template writes calls as {sign}")
        return


def _has_reasoning_parser(given: Given) -> bool:
    structured = given.mapping("--structured-outputs-config")
    return given.has("--reasoning-parser") or bool(structured.get("reasoning_parser"))
