# SPDX-License-Identifier: Apache-2.0
"""What a foreign checkpoint format is to this package: how each of its modules is stored and read.

A format is found by `config.json` and the names of the tensors, before a tensor is read. It then
knows for every quantized module which tensors make it up, and the function that turns them into
our integers, scales and zero points, or into a dense weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vllm_nanoquant.checkpoint.errors import CheckpointError
from vllm_nanoquant.checkpoint.naming import is_routed_expert
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.roles import role_of

_MAX_NAMES_IN_ERROR = 4

ACTIVATION_TENSORS = frozenset(
    {
        "activation_scale",
        "input_scale",
        "input_global_scale",
        "input_zero_point",
        "output_scale",
        "kv_scale",
        "q_scale",
        "k_scale",
        "v_scale",
        "q_zero_point",
        "k_zero_point",
        "v_zero_point",
    }
)
"""Last parts of tensor names that speak of activations or of the KV cache: dropped."""


class FormatError(CheckpointError):
    """A checkpoint that cannot be read or written; the text names tensor, value and way out.

    Names come from untrusted input, so control characters in the text are shown as escapes.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text))


@dataclass(frozen=True)
class Converted:
    """One module's weight [N, K] in our number format.

    Attributes:
        weight: integers, scales and zero points.
        order: int32 [K], or None where the columns are in the order of the input features. Stored
            column j multiplies input feature order[j].
        rounded_scales: scales that bf16 does not hold exactly.
        largest_rounding: largest relative change of a scale.
    """

    weight: QuantizedWeight
    order: torch.Tensor | None = None
    rounded_scales: int = 0
    largest_rounding: float = 0.0


Tensors = Mapping[str, torch.Tensor]
"""A module's tensors by the last part of their names, as in `{"qweight": ..., "scales": ...}`."""


class ModuleScheme(NamedTuple):
    """What becomes of a module that a foreign checkpoint holds quantized.

    Attributes:
        group_size: inputs per scale of the integers taken over; None for a weight that is read as
            a dense one.
        servable: whether our method serves such a module in int4. Routed experts and modules
            without a role are not: they become bf16.
    """

    group_size: int | None
    servable: bool


class Layout(NamedTuple):
    """What is known of a module's weight before its large tensors are read.

    Attributes:
        rows: N.
        columns: K.
        ordered: whether our form of it needs the order of its columns.
    """

    rows: int
    columns: int
    ordered: bool = False


SMALL_TENSORS = frozenset({"weight_shape", "weight_g_idx", "g_idx"})
"""Last parts of the names of tensors whose content a layout depends on."""


@dataclass(frozen=True)
class StoredModule:
    """One quantized module of a foreign checkpoint.

    The two functions are partials of functions of a Python module, so that a format can be sent to
    another process. Both take the module's name, for errors, and its tensors; both raise
    FormatError where the tensors do not fit.

    Attributes:
        storage: how it is stored, in words: "gptq", "fp8", ...
        suffixes: last parts of the names of its tensors; all must arrive before it can be read.
        layout: shape of its weight; needs the content of `SMALL_TENSORS` only, the others may be
            on the meta device.
        read: our integers, or a dense bf16 weight [N, K].
        group_size: inputs per scale of our integers; None where `read` gives a dense weight.
        name: the module's name in the result, where it differs from its name in the source.
    """

    storage: str
    suffixes: frozenset[str]
    layout: Callable[[str, Tensors], Layout]
    read: Callable[[str, Tensors], Converted | torch.Tensor]
    group_size: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Format:
    """A foreign checkpoint's way of storing weights, with every quantized module it holds.

    Attributes:
        name: for people: "awq", "compressed-tensors", ...
        modules: by the name that the tensors carry in the source.
        dropped: names of tensors that have no counterpart in the result.
    """

    name: str
    modules: Mapping[str, StoredModule]
    dropped: frozenset[str] = field(default=frozenset())

    def scheme(self, module: str) -> ModuleScheme | None:
        """What becomes of a module, by its name in the source; None for one not quantized there."""
        stored = self.modules.get(module)
        if stored is None:
            return None
        return ModuleScheme(stored.group_size, is_servable(stored.name or module))

    @property
    def integer_modules(self) -> dict[str, int]:
        """Group size by name in the result, of each module whose integers are taken over."""
        found = {}
        for source, stored in self.modules.items():
            name = stored.name or source
            if stored.group_size is not None and is_servable(name):
                found[name] = stored.group_size
        return found

    @property
    def requantized_modules(self) -> tuple[str, ...]:
        """Names in the result of the modules that are read as dense weights and can become int4."""
        names = {source: stored.name or source for source, stored in self.modules.items()}
        return tuple(
            sorted(
                names[source]
                for source, stored in self.modules.items()
                if stored.group_size is None and is_servable(names[source])
            )
        )

    @property
    def in_words(self) -> str:
        """One line for people: how many modules are stored in which way."""
        counts: dict[str, int] = {}
        for stored in self.modules.values():
            group = f", group size {stored.group_size}" if stored.group_size else ""
            counts[stored.storage + group] = counts.get(stored.storage + group, 0) + 1
        parts = ", ".join(f"{count} modules in {how}" for how, count in sorted(counts.items()))
        return f"{self.name}: {parts}"


def is_servable(module: str) -> bool:
    """Whether a module that another tool quantized is int4 when we serve it.

    It has a role, and is no routed expert: other tools often leave one of an expert's projections
    as it was, and ours must all be int4 or none.
    """
    return role_of(module) is not None and not is_routed_expert(module)


def by_module(names: Iterable[str]) -> dict[str, set[str]]:
    """Last parts of tensor names by what stands before them; a name without a dot has module ''."""
    modules: dict[str, set[str]] = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, set()).add(suffix)
    return modules


def require_suffixes(module: str, present: Iterable[str], needed: Iterable[str]) -> None:
    """Raise FormatError where a module lacks one of the tensors that its storage needs."""
    missing = sorted(set(needed) - set(present))
    if missing:
        raise FormatError(
            f"module {module!r} has {', '.join(sorted(present))} but not {', '.join(missing)}; the "
            "checkpoint is incomplete: fetch it again"
        )


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = sorted(names)
    shown = ", ".join(every[:_MAX_NAMES_IN_ERROR])
    more = len(every) - _MAX_NAMES_IN_ERROR
    return f"{shown} and {more} more" if more > 0 else shown


def as_integer(value: object, place: str) -> int:
    """A whole number out of a config; raises FormatError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"{place} is {value!r}; it must be a whole number")
    return value


def as_mapping(value: object, place: str) -> Mapping[str, object]:
    """An object out of a config; raises FormatError for anything else."""
    if not isinstance(value, Mapping):
        raise FormatError(f"{place} is {value!r}; it must be an object")
    return value


def matches_from_start(expression: str, module: str) -> bool:
    """Whether a regular expression out of a config matches the beginning of a module's name.

    Raises FormatError for what is not a regular expression.
    """
    try:
        return re.match(expression, module) is not None
    except re.error as error:
        raise FormatError(
            f"{expression!r} in quantization_config is not a regular expression: {error}"
        ) from None
