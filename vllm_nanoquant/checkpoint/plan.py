# SPDX-License-Identifier: Apache-2.0
"""What will be written, tensor by tensor, known from headers alone before a weight is read."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.header import TensorEntry
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.source import keeps_lm_head, kinds_of
from vllm_nanoquant.checkpoint.stored import int4_schemes
from vllm_nanoquant.checkpoint.writer import OutputTensor
from vllm_nanoquant.recipe import METHOD, Recipe, Scheme
from vllm_nanoquant.roles import LayerKind

QUANTIZABLE = ("BF16", "F16", "F32")

# Projections that vLLM multiplies as one: they need one treatment.
_SERVED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_NAME_ALL = "name all of them, or none, in ignore and overrides"


@dataclass(frozen=True)
class Step:
    """One tensor of the source, and what becomes of it.

    Attributes:
        source: the tensor.
        scheme: how it is quantized; None when it is copied.
        outputs: what is written for it, in this order.
    """

    source: TensorEntry
    scheme: Scheme | None
    outputs: tuple[OutputTensor, ...]

    @property
    def key(self) -> str:
        """Name of it in the journal and the report."""
        return self.source.name

    @property
    def sources(self) -> tuple[TensorEntry]:
        """What is read for it."""
        return (self.source,)

    @property
    def is_int4(self) -> bool:
        """Whether it is quantized."""
        return self.scheme is not None


@dataclass(frozen=True)
class Plan:
    """The whole result.

    Attributes:
        recipe: what was asked for.
        kinds: kind of each layer, as far as config.json tells.
        steps: one for each tensor, in the order of the source.
    """

    recipe: Recipe
    kinds: tuple[LayerKind, ...] | None
    steps: tuple[Step, ...]


def make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    """Plan the quantized form of a stock checkpoint. The same arguments give the same plan.

    Tensors keep the source's order, so that its files are read from front to back.

    Raises:
        RecipeError: a pattern matches nothing, or the preset does not suit the model.
        UsageError: the recipe quantizes nothing, or splits modules that are served as one.
        CheckpointError: a weight that is to be quantized has a dtype that cannot be.
    """
    kinds = kinds_of(source.config)
    schemes = schemes_of(source, recipe, kinds)
    steps = [_plan_step(source, entry, schemes) for entry in source.tensors.values()]
    if not any(step.scheme for step in steps):
        raise UsageError(f"nothing to quantize: {recipe.in_words} covers no module of the source")
    return Plan(recipe, kinds, tuple(steps))


def schemes_of(
    source: Checkpoint, recipe: Recipe, kinds: Sequence[LayerKind] | None
) -> dict[str, Scheme]:
    """Scheme of each module of a stock checkpoint that becomes int4.

    Only weights with two dimensions do; experts that lie in one tensor with three stay as they
    are. So does an LM head that shares the embedding's weights, as it does when a stock checkpoint
    is quantized while it loads.

    Raises:
        RecipeError, UsageError: as `make_plan`.
    """
    modules = naming.modules_with_weights(source.tensors)
    recipe.check_against(modules)
    matrices = []
    for module in modules:
        entry = source.tensors.get(module + naming.WEIGHT)
        if entry is not None and len(entry.shape) == 2 and entry.numel:
            matrices.append(module)
    schemes = int4_schemes(matrices, recipe, kinds, keeps_lm_head(source.config))
    refuse_split_products(modules, schemes)
    return schemes


def refuse_split_products(
    modules: Iterable[str], treatments: Mapping[str, Hashable], way_out: str = _NAME_ALL
) -> None:
    """Refuse projections that vLLM serves as one product, and that are not treated as one.

    Args:
        modules: names of all modules.
        treatments: whatever is equal for modules that are treated alike; absent: as they are.
        way_out: for the message.

    Raises:
        UsageError: some of q, k and v, of gate and up, or of a layer's routed experts are treated
            otherwise than the rest.
    """
    present = set(modules)
    _refuse_split_mixtures(present, treatments, way_out)
    for module in sorted(present):
        parent, _, leaf = module.rpartition(".")
        for leaves in _SERVED_TOGETHER:
            if leaf != leaves[0]:
                continue
            parts = [f"{parent}.{part}".lstrip(".") for part in leaves]
            parts = [part for part in parts if part in present]
            if len({treatments.get(part) for part in parts}) > 1:
                raise UsageError(
                    f"{METHOD}: {', '.join(map(printable, parts))} are served as one product and "
                    f"need the same treatment; {way_out}"
                )


def _refuse_split_mixtures(
    modules: Iterable[str], treatments: Mapping[str, Hashable], way_out: str
) -> None:
    first: dict[str, str] = {}
    for module in sorted(modules):
        mixture = naming.mixture_of(module)
        if mixture is None:
            continue
        one = first.setdefault(mixture, module)
        if treatments.get(one) != treatments.get(module):
            raise UsageError(
                f"{METHOD}: the experts of {printable(mixture)} are served together and need the "
                f"same treatment, but {printable(one)} and {printable(module)} get different "
                f"ones; {way_out}"
            )


def _plan_step(source: Checkpoint, entry: TensorEntry, schemes: dict[str, Scheme]) -> Step:
    module = entry.name.removesuffix(naming.WEIGHT)
    scheme = schemes.get(module) if entry.name.endswith(naming.WEIGHT) else None
    if scheme is None:
        return Step(entry, None, (OutputTensor(entry.name, entry.dtype, entry.shape),))
    if entry.dtype not in QUANTIZABLE:
        raise CheckpointError(
            f"{at(source.file_of(entry.name), entry.name)}: {entry.dtype} weights cannot be "
            f"quantized, only {', '.join(QUANTIZABLE)}; name the module in ignore to keep it"
        )
    rows, columns = entry.shape
    layout = naming.quantized_layout(rows, columns, scheme.group_size)
    outputs = tuple(OutputTensor(module + suffix, *form) for suffix, form in layout.items())
    return Step(entry, scheme, outputs)
