# SPDX-License-Identifier: Apache-2.0
"""What a conversion will write, tensor by tensor, before a large tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.formats import Format, FormatError, Layout, StoredModule
from vllm_nanoquant.checkpoint.formats.base import SMALL_TENSORS, is_servable
from vllm_nanoquant.checkpoint.formats.export import (
    check_layout,
    is_symmetric,
    pack_config,
    packed_layout,
)
from vllm_nanoquant.checkpoint.formats.stream import tell_dropped
from vllm_nanoquant.checkpoint.header import TensorEntry
from vllm_nanoquant.checkpoint.plan import refuse_split_products
from vllm_nanoquant.checkpoint.reader import TORCH_DTYPES, Checkpoint
from vllm_nanoquant.checkpoint.report import producer
from vllm_nanoquant.checkpoint.source import kinds_of
from vllm_nanoquant.checkpoint.structure import parse_recipe
from vllm_nanoquant.checkpoint.writer import OutputTensor
from vllm_nanoquant.quantize.groups import WHOLE_ROW
from vllm_nanoquant.recipe import METHOD, Override, Recipe

_PRESETS = ("balanced", "ssm", "full")
_NOT_SPLIT = "this checkpoint cannot be served; quantize the unquantized model instead"
_PATTERN_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class ConvertStep:
    """One module or tensor of the source, and what becomes of it.

    Attributes:
        key: name of it in the journal and, for a module, of its weight in the report.
        sources: its tensors in the source.
        outputs: what is written for it.
        module: the module's name in the source; None for a tensor that is copied.
        shape: N and K of a module.
        group_size: of the integers written; None where none are.
    """

    key: str
    sources: tuple[TensorEntry, ...]
    outputs: tuple[OutputTensor, ...]
    module: str | None = None
    shape: tuple[int, int] | None = None
    group_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the source."""
        return sum(entry.nbytes for entry in self.sources)

    @property
    def is_int4(self) -> bool:
        """Whether integers are written for it."""
        return self.group_size is not None


@dataclass(frozen=True)
class ConvertPlan:
    """Every step, in the order of the source, and the `quantization_config` of the result."""

    steps: tuple[ConvertStep, ...]
    quantization: dict[str, Any]


def plan_import(source: Checkpoint, fmt: Format, group_size: int, algorithm: str) -> ConvertPlan:
    """Plan a foreign checkpoint's form in our format.

    Args:
        source: the foreign checkpoint.
        fmt: its format.
        group_size: for weights that are read as dense ones and quantized again.
        algorithm: for those.

    Raises:
        FormatError: a module that cannot be read.
        UsageError: no module becomes int4, or of modules that are served as one product only some.
    """
    tell_dropped(fmt)
    steps = []
    done = set()
    for name, entry in source.tensors.items():
        module, _, suffix = name.rpartition(".")
        stored = fmt.modules.get(module)
        if name in fmt.dropped:
            continue
        if stored is None or suffix not in stored.suffixes:
            steps.append(_copied(source, entry))
        elif module not in done:
            done.add(module)
            steps.append(_imported(source, module, stored, group_size))
    int4 = {step.key: step.group_size for step in steps if step.group_size is not None}
    if not int4:
        raise UsageError(
            f"nothing would be int4: {fmt.in_words}, and our method serves none of them in int4"
        )
    results = {output.name for step in steps for output in step.outputs}
    sizes = {key.removesuffix(naming.WEIGHT): size for key, size in int4.items()}
    dense = {name.removesuffix(naming.WEIGHT) for name in results if name.endswith(naming.WEIGHT)}
    refuse_split_products([*sizes, *dense], sizes, _NOT_SPLIT)
    recipe = recipe_of(sizes, dense, algorithm)
    version = {"format_version": naming.FORMAT_VERSION}
    stored_as = recipe.model_dump(mode="json")
    quantization = {"quant_method": METHOD, **version, **stored_as, "producer": producer()}
    return ConvertPlan(tuple(steps), quantization)


def _copied(source: Checkpoint, entry: TensorEntry) -> ConvertStep:
    if entry.dtype.startswith(("F8", "F6", "F4")):
        raise FormatError(
            f"{at(source.file_of(entry.name), entry.name)} is {entry.dtype}, and nothing says what "
            "its scale is; such a tensor cannot be read"
        )
    return ConvertStep(entry.name, (entry,), (OutputTensor(entry.name, entry.dtype, entry.shape),))


def _imported(
    source: Checkpoint, module: str, stored: StoredModule, group_size: int
) -> ConvertStep:
    rows, columns, ordered = layout_of(source, module, stored)
    entries = tuple(source.tensors[f"{module}.{suffix}"] for suffix in sorted(stored.suffixes))
    name = stored.name or module
    key = name + naming.WEIGHT
    if not is_servable(name):
        dense = (OutputTensor(key, "BF16", (rows, columns)),)
        return ConvertStep(key, entries, dense, module, (rows, columns))
    size = group_size if stored.group_size is None else stored.group_size
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        **naming.quantized_layout(rows, columns, size)
    }
    if ordered:
        layout[naming.ORDER] = ("I32", (columns,))
    outputs = tuple(OutputTensor(name + suffix, *form) for suffix, form in layout.items())
    return ConvertStep(key, entries, outputs, module, (rows, columns), size)


def layout_of(source: Checkpoint, module: str, stored: StoredModule) -> Layout:
    """Shape of a module; only its small tensors are read.

    Raises:
        FormatError: its tensors do not fit one another.
        CheckpointError: a small tensor is not small, or cannot be read.
    """
    tensors = {}
    for suffix in stored.suffixes:
        entry = source.tensors[f"{module}.{suffix}"]
        place = at(source.file_of(entry.name), entry.name)
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{place}: the dtype {entry.dtype} cannot be loaded")
        if suffix not in SMALL_TENSORS:
            dtype = TORCH_DTYPES[entry.dtype]
            tensors[suffix] = torch.empty(entry.shape, dtype=dtype, device="meta")
        elif len(entry.shape) != 1:
            raise CheckpointError(f"{place}: {list(entry.shape)}; it must have one dimension")
        else:
            tensors[suffix] = source.load(entry.name)
    return stored.layout(module, tensors)


def recipe_of(int4: Mapping[str, int], dense: Iterable[str], algorithm: str) -> Recipe:
    """A recipe that covers exactly these modules: the nearest preset, and exceptions by name.

    Args:
        int4: group size of each module that is int4.
        dense: modules that have a dense weight.
        algorithm: named in the recipe; the integers are there already.

    Raises:
        FormatError: a module's name would be read as a pattern.
    """
    for name in int4:
        if _PATTERN_CHARACTERS & set(name) or name.startswith("re:"):
            raise FormatError(f"the name of module {name!r} would be read as a pattern")
    common = Counter(int4.values()).most_common(1)[0][0]
    best: Recipe | None = None
    for preset in _PRESETS:
        plain = Recipe.parse({"preset": preset, "group_size": common, "algorithm": algorithm})
        overrides = {}
        for name, size in int4.items():
            if plain.scheme(name, None) is None or size != common:
                overrides[name] = Override.model_validate(
                    {"bits": 4, "group_size": None if size == common else size}
                )
        for name in dense:
            if plain.scheme(name, None) is not None:
                # None of the experts of a checkpoint that is converted is int4.
                mixture = naming.mixture_of(name)
                overrides[f"{mixture}.*" if mixture else name] = Override(bits=16)
        ordered = {name: overrides[name] for name in sorted(overrides)}
        if best is None or len(ordered) < len(best.overrides):
            best = plain.model_copy(update={"overrides": ordered})
    assert best is not None
    return best


def plan_export(source: Checkpoint, shapes: Mapping[str, tuple[int, int]]) -> ConvertPlan:
    """Plan our checkpoint's form in `pack-quantized`. Reads every zero point.

    Args:
        source: a checkpoint in our format.
        shapes: N and K of weights by the report; where it is silent, K is even.

    Raises:
        FormatError: a module that the format cannot say.
        CheckpointError: a recipe or tensors that do not fit one another.
    """
    recipe = parse_recipe(source.config["quantization_config"])
    kinds = kinds_of(source.config)
    sizes, symmetric = {}, True
    columns = {}
    for name, entry in source.tensors.items():
        if not name.endswith(naming.PACKED):
            continue
        module = name.removesuffix(naming.PACKED)
        scheme = recipe.scheme(module, kinds)
        zero_point = source.tensors.get(module + naming.ZERO_POINT)
        if scheme is None or len(entry.shape) != 2 or zero_point is None:
            raise CheckpointError(
                f"{at(source.file_of(name), name)}: does not fit the recipe; nanoquant verify says "
                "what is wrong"
            )
        half, rows = entry.shape
        columns[module] = shapes.get(module, (rows, 2 * half))[1]
        ordered = module + naming.ORDER in source.tensors
        check_layout(module, columns[module], scheme.group_size, ordered)
        groups = 1 if scheme.group_size == WHOLE_ROW else columns[module] // scheme.group_size
        if (zero_point.dtype, zero_point.shape) != ("BF16", (groups, rows)):
            raise CheckpointError(
                f"{at(source.file_of(zero_point.name), zero_point.name)}: {zero_point.dtype} "
                f"{list(zero_point.shape)}; it must be BF16 {[groups, rows]}"
            )
        sizes[module] = scheme.group_size
        symmetric &= is_symmetric(module, source.load(zero_point.name))
    steps = []
    for name, entry in source.tensors.items():
        suffix = next((s for s in naming.QUANTIZED_SUFFIXES if name.endswith(s)), None)
        module = name.removesuffix(suffix) if suffix else name
        if suffix is None or module not in sizes:
            steps.append(_copied(source, entry))
        elif suffix == naming.PACKED:
            shape = (entry.shape[1], columns[module])
            steps.append(_exported(source, module, shape, sizes[module], symmetric))
    dense = [
        entry.name.removesuffix(naming.WEIGHT)
        for entry in source.tensors.values()
        if entry.name.endswith(naming.WEIGHT) and len(entry.shape) >= 2
    ]
    return ConvertPlan(tuple(steps), pack_config(sizes, dense, symmetric))


def _exported(
    source: Checkpoint, module: str, shape: tuple[int, int], size: int, symmetric: bool
) -> ConvertStep:
    suffixes = (naming.PACKED, naming.SCALE, naming.ZERO_POINT)
    missing = [suffix for suffix in suffixes if module + suffix not in source.tensors]
    if missing:
        raise CheckpointError(f"{printable(module + missing[0])}: is missing")
    entries = tuple(source.tensors[module + suffix] for suffix in suffixes)
    layout = packed_layout(*shape, size, symmetric)
    outputs = tuple(OutputTensor(f"{module}.{name}", *form) for name, form in layout.items())
    return ConvertStep(module + naming.WEIGHT, entries, outputs, module, shape, size)
