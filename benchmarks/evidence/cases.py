# SPDX-License-Identifier: Apache-2.0
"""What is measured, the most wanted first: a time limit cuts the list off somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_nanoquant.recipe import Recipe
from vllm_nanoquant.roles import LayerKind, sensitive_layers

PRESETS = ("balanced", "full", "quality", "ssm")
ALGORITHMS = ("minmax", "mse", "gptq")
PARTS = ("gate", "x", "B", "C", "dt")
PEERS = (
    "rtn-sym", "rtn-asym", "mse-sym", "gptq-sym", "gptq-mse-sym", "gptq-asym",
)  # fmt: skip
WITHOUT_HEAD = ("lm_head",)
"""What llm-compressor's W4A16 recipes leave alone."""


@dataclass(frozen=True)
class Case:
    """One way to quantize the model.

    Attributes:
        section: which table it belongs to.
        name: unique.
        recipe: which modules, and the group size.
        method: of `methods.round_weight`.
        only: modules that are quantized of those; None for all.
        part: rows of in_proj that are quantized, of PARTS; None for all.
        is_long: whether long windows are scored as well.
        samples: calibration sequences; None for the default.
        seed: which calibration sequences.
    """

    section: str
    name: str
    recipe: Recipe
    method: str
    only: str | None = None
    part: str | None = None
    is_long: bool = False
    samples: int | None = None
    seed: int = 0


def _case(section: str, preset: str, group_size: int, method: str, **more: object) -> Case:
    ignore = more.pop("ignore", ())
    recipe = Recipe.parse({"preset": preset, "group_size": group_size, "ignore": ignore})
    name = str(more.pop("name", f"{preset}-g{group_size}-{method}"))
    return Case(section, name, recipe, method, **more)  # type: ignore[arg-type]


def cases(kinds: tuple[LayerKind, ...]) -> Iterator[Case]:
    """All of them.

    Args:
        kinds: of the model's layers.
    """
    for method in ALGORITHMS:
        yield _case("presets", "balanced", 128, method, is_long=True)
    yield _case("peers", "balanced", 128, "fp8-w8a8", is_long=True, name="balanced-fp8-w8a8")
    for preset in PRESETS[1:]:
        for method in ALGORITHMS:
            yield _case("presets", preset, 128, method, is_long=method != "minmax")
    yield from _peers(128)
    yield from _one_at_a_time("mse", kinds)
    for group_size in (64, 32):
        for method in ALGORITHMS:
            yield _case("groups", "balanced", group_size, method, is_long=group_size == 32)
    for method in ("minmax-int", "mse-int", "gptq-int"):
        yield _case("zeros", "balanced", 128, method)
    yield _case("peers", "balanced", 128, "fp8", name="balanced-fp8")
    yield _case("peers", "full", 128, "fp8-w8a8", name="full-fp8-w8a8")
    yield from _peers(32)
    yield from _left_out(kinds)
    for method in ("minmax-int", "mse-int", "gptq-int"):
        yield _case("zeros", "balanced", 32, method)
    yield from _calibrations()
    yield from _one_at_a_time("gptq", kinds)
    yield from _single_layers(kinds)


def _peers(group_size: int) -> Iterator[Case]:
    """llm-compressor's methods on the modules of its recipes, and ours on the same."""
    for method in (*ALGORITHMS, *PEERS):
        is_long = group_size == 128 and method in ("rtn-sym", "gptq-mse-sym")
        yield _case(
            "peers",
            "full",
            group_size,
            method,
            ignore=WITHOUT_HEAD,
            name=f"linears-g{group_size}-{method}",
            is_long=is_long,
        )


def _one_at_a_time(method: str, kinds: tuple[LayerKind, ...]) -> Iterator[Case]:
    """Each kind of weight alone in int4."""

    def alone(name: str, only: str, part: str | None = None) -> Case:
        return _case(
            "kinds", "full", 128, method, only=only, part=part, name=f"only-{name}-{method}"
        )

    for leaf in ("in_proj", "out_proj", "up_proj", "down_proj", "o_proj"):
        yield alone(leaf, f"*.{leaf}")
    yield alone("qkv", "re:.*\\.[qkv]_proj")
    yield alone("lm_head", "lm_head")
    for part in PARTS:
        yield alone(f"in_proj-{part}", "*.in_proj", part)
    last = len(kinds) - 1
    yield alone("first-two-layers", "re:.*layers\\.[01]\\..*")
    yield alone("last-two-layers", f"re:.*layers\\.({last - 1}|{last})\\..*")
    feeding = "|".join(map(str, sorted(sensitive_layers(kinds))))
    yield alone("mamba-before-attention", f"re:.*layers\\.({feeding})\\..*")


def _left_out(kinds: tuple[LayerKind, ...]) -> Iterator[Case]:
    """Preset balanced, with some layers left in BF16: what it is worth to leave them alone."""
    last = len(kinds) - 1
    left = {
        "first-two": ("re:.*layers\\.[01]\\..*",),
        "last-two": (f"re:.*layers\\.({last - 1}|{last})\\..*",),
        "out_proj": ("*.out_proj",),
        "down_proj": ("*.down_proj",),
    }
    for method in ("mse", "gptq"):
        for name, ignore in left.items():
            full = f"balanced-but-{name}-{method}"
            yield _case("left-out", "balanced", 128, method, ignore=ignore, name=full)


def _calibrations() -> Iterator[Case]:
    """Preset balanced with GPTQ on other text, and less or more of it."""
    for seed in (1, 2):
        name = f"balanced-g128-gptq-seed{seed}"
        yield _case("calibration", "balanced", 128, "gptq", seed=seed, name=name)
    for samples in (16, 128, 512):
        name = f"balanced-g128-gptq-{samples}-sequences"
        yield _case("calibration", "balanced", 128, "gptq", samples=samples, name=name)


def _single_layers(kinds: tuple[LayerKind, ...]) -> Iterator[Case]:
    for layer, kind in enumerate(kinds):
        name = f"only-layer-{layer}-{kind.value}"
        only = f"re:.*layers\\.{layer}\\..*"
        yield _case("layers", "full", 128, "mse", only=only, name=name)
