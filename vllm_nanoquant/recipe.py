# SPDX-License-Identifier: Apache-2.0
"""The recipe: which modules become int4, and how.

A recipe is data. It is read from ``quantization_config`` in config.json or from the command line,
checked here once, and asked for the scheme of each module by name. It knows neither torch nor vLLM.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, Self

import regex
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from vllm_nanoquant.roles import LayerKind, Role, layer_index, role_of, sensitive_layers

METHOD = "nanoquant_w4a16"
"""The name of the quantization method, in config.json and on the command line."""

GroupSize = Literal[32, 64, 128, -1]
Preset = Literal["ssm", "balanced", "quality", "full"]
Algorithm = Literal["minmax", "mse", "gptq"]

_PRESET_ROLES: dict[str, frozenset[Role]] = {
    "ssm": frozenset({Role.MAMBA}),
    "balanced": frozenset({Role.MAMBA, Role.MLP}),
    "quality": frozenset({Role.MAMBA, Role.MLP}),
    "full": frozenset(Role),
}
_MAX_NAMES_IN_ERROR = 4
_REGEX = "re:"
# Expressions may come from a hostile config.json. Repeats are written out as they are compiled,
# and matching may take years, where a sane expression takes microseconds.
_MAX_REGEX_SIZE = 100_000
_REGEX_SECONDS = 0.05

MAX_CAPTURE_SIZE = 512
"""Largest batch, in tokens, that the cap on CUDA graphs can be raised to."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the text names the value, the place and the way out."""


class Scheme(NamedTuple):
    """How one module is quantized: asymmetric int4 with ``group_size`` inputs per scale."""

    group_size: int
    algorithm: str


class Override(BaseModel):
    """Exception to the preset for the modules a pattern matches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[4, 16] = 4
    """4: quantize; 16: leave in the checkpoint's dtype."""
    group_size: GroupSize | None = None
    """Inputs per scale; None takes the recipe's."""


def _one_or_many(value: Any) -> Any:
    """A single pattern may be given as a plain string."""
    return (value,) if isinstance(value, str) else value


class Recipe(BaseModel):
    """Which modules become int4, and how.

    Precedence: ``ignore`` over ``overrides`` (the last match wins) over ``preset``. Patterns are
    names of the checkpoint's modules: exact, with shell wildcards (``*.layers.0.*``), or regular
    expressions with the prefix ``re:``, which must match the whole name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Preset = "balanced"
    group_size: GroupSize = 128
    algorithm: Algorithm = "mse"
    ignore: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ()
    overrides: dict[str, Override] = {}

    @field_validator("ignore", "overrides")
    @classmethod
    def _patterns_compile(cls, patterns: Any) -> Any:
        for pattern in patterns:
            if pattern.startswith(_REGEX):
                _check_regex(pattern)
        return patterns

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Check user-given options.

        Raises:
            RecipeError: one line for each wrong option: what, where, and what would be right.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            lines = [_explain(problem, cls) for problem in error.errors()]
            raise RecipeError(f"{METHOD}: " + "; ".join(lines)) from None

    @property
    def in_words(self) -> str:
        """The recipe's main options, for people."""
        return f"preset {self.preset}, group size {self.group_size}, {self.algorithm}"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern of ``ignore`` and ``overrides``."""
        return (*self.ignore, *self.overrides)

    @property
    def fingerprint(self) -> str:
        """Digest of every option: two recipes that could differ in any weight differ here."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def with_renamed_patterns(self, rename: Callable[[str], str]) -> Self:
        """Return the same recipe with each pattern twice: as written, and renamed.

        Args:
            rename: from a name or pattern of the checkpoint, without ``re:``, to another's.
        """

        def both(pattern: str) -> tuple[str, str]:
            bare = pattern.removeprefix(_REGEX)
            return pattern, pattern.removesuffix(bare) + rename(bare)

        ignore = tuple(name for pattern in self.ignore for name in both(pattern))
        overrides = {
            name: override for pattern, override in self.overrides.items() for name in both(pattern)
        }
        return self.model_copy(update={"ignore": ignore, "overrides": overrides})

    def scheme(self, module: str, kinds: Sequence[LayerKind] | None) -> Scheme | None:
        """Scheme of a module, or None when it stays as it is.

        Args:
            module: full module name, as in ``model.layers.3.mixer.in_proj``.
            kinds: kind of each layer; preset ``quality`` needs it.

        Raises:
            RecipeError: preset ``quality`` on a model whose layer kinds are unknown.
        """
        if any(matches(pattern, module) for pattern in self.ignore):
            return None
        override = None
        for pattern, candidate in self.overrides.items():
            if matches(pattern, module):
                override = candidate
        if override is not None and override.bits == 16:
            return None
        if override is None and not self._preset_covers(module, kinds):
            return None
        if role_of(module) is None:  # an override of all of a layer, its norms and router included
            return None
        group_size = override.group_size if override and override.group_size else self.group_size
        return Scheme(group_size, self.algorithm)

    def _preset_covers(self, module: str, kinds: Sequence[LayerKind] | None) -> bool:
        if role_of(module) not in _PRESET_ROLES[self.preset]:
            return False
        if self.preset != "quality":
            return True
        if kinds is None:
            raise RecipeError(
                f"{METHOD}: preset 'quality' needs the kind of each layer, and this model's "
                "config.json has neither hybrid_override_pattern nor layers_block_type, "
                "layer_types or attn_layer_indices that tells Mamba layers from attention layers; "
                "choose another preset, or name the layers to keep in 'ignore'"
            )
        return layer_index(module) not in sensitive_layers(kinds)

    def check_against(self, modules: Iterable[str]) -> None:
        """Check every pattern against the names of a checkpoint's modules.

        Raises:
            RecipeError: a pattern matches nothing, or asks for int4 where it is never used.
        """
        names = sorted(modules)
        for pattern in self.patterns:
            found = [name for name in names if matches(pattern, name)]
            if not found:
                raise RecipeError(_nothing_matches(pattern, names))
            override = self.overrides.get(pattern)
            if override and override.bits == 4 and not any(role_of(name) for name in found):
                raise RecipeError(
                    f"{METHOD}: overrides[{pattern!r}] asks for int4, but {found[0]} is "
                    "never quantized (conv1d, norms, routers, embeddings and the like); remove it"
                )


class ServingOptions(Recipe):
    """A recipe, and what only the serving engine needs to know. The weights do not depend on it."""

    max_capture_size: Annotated[int, Field(ge=1, le=MAX_CAPTURE_SIZE)] = 8
    """Largest batch, in tokens, that a CUDA graph is captured for."""


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern (exact name, shell wildcards, or ``re:`` and a regex) names a module.

    Raises:
        RecipeError: the regex takes too long, as one with nested repeats does.
    """
    if not pattern.startswith(_REGEX):
        return fnmatchcase(module, pattern)
    expression = _compiled(pattern.removeprefix(_REGEX))
    try:
        return expression.fullmatch(module, timeout=_REGEX_SECONDS) is not None
    except (TimeoutError, MemoryError):
        raise RecipeError(
            f"{METHOD}: the pattern {pattern!r} in quantization_config takes too long for the name "
            f"{module}; write it without a repeat inside of a repeat, as in (a+)+"
        ) from None


@lru_cache
def _compiled(expression: str) -> Any:
    """A compiled expression of ``regex``, which unlike ``re`` knows a time limit."""
    return regex.compile(expression)


def _check_regex(pattern: str) -> None:
    """Raise ValueError for a pattern that is no regular expression, or too large a one."""
    size = len(pattern)
    for repeat in regex.findall(r"\{[^{}]*\}", pattern):
        size *= max(map(int, regex.findall("[0-9]{1,9}", repeat)), default=1) or 1
    if size > _MAX_REGEX_SIZE:
        raise ValueError(f"{pattern[:80]!r} is too large with its repeats; use smaller ones")
    try:
        _compiled(pattern.removeprefix(_REGEX))
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from error


def _nothing_matches(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, _MAX_NAMES_IN_ERROR, cutoff=0.5)
    quantizable = [name for name in names if role_of(name)]
    examples = ", ".join(near or quantizable[:_MAX_NAMES_IN_ERROR])
    return (
        f"{METHOD}: the pattern {pattern!r} in quantization_config matches no module of the "
        f"checkpoint; its modules are named like {examples}"
    )


def _explain(problem: Any, schema: type[BaseModel]) -> str:
    """One pydantic problem as a sentence that names the value, the place and the way out."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(Override.model_fields if len(problem["loc"]) > 1 else schema.model_fields)
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown option {place!r} in quantization_config; {hint}known: {', '.join(known)}"
    return f"quantization_config.{place} = {problem['input']!r}: {problem['msg']}"
