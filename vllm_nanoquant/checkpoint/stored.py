# SPDX-License-Identifier: Apache-2.0
"""What the headers of an int4 checkpoint say, held against its recipe before a weight is read.

Knows neither torch tensors nor vLLM: names, dtypes and shapes in, errors or plain data out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm_nanoquant.checkpoint.naming import (
    FORMAT_VERSION,
    ORDER,
    PACKED,
    QUANTIZED_SUFFIXES,
    SCALE,
    WEIGHT,
    ZERO_POINT,
    is_routed_expert,
    mixture_of,
    modules_with_weights,
    quantized_layout,
)
from vllm_nanoquant.recipe import METHOD, Recipe, RecipeError, Scheme
from vllm_nanoquant.roles import LayerKind, Role, role_of

FORMAT_KEYS = ("quant_method", "format_version", "producer")
"""Keys of quantization_config that describe a checkpoint and are no options of the recipe."""

_QUANTIZE = "nanoquant quantize"
_MAX_NAMES_IN_ERROR = 4


@dataclass(frozen=True)
class Int4Module:
    """One int4 module of a checkpoint, as its headers describe it.

    Attributes:
        name: full name of the module.
        packed_shape: ceil(K / 2) and N; None where another format's headers do not tell.
        ordered: whether it has a ``weight_order``.
    """

    name: str
    packed_shape: tuple[int, int] | None
    ordered: bool

    @classmethod
    def from_headers(cls, name: str, tensors: Mapping[str, Any]) -> Self:
        """Describe a module by headers that are as they must be.

        Args:
            name: full name of the module, which has a packed weight.
            tensors: ``{"dtype": ..., "shape": [...]}`` by name, for the whole checkpoint.
        """
        packed_rows, rows = tensors[name + PACKED]["shape"]
        return cls(name, (packed_rows, rows), name + ORDER in tensors)


def _require_sound(name: str, tensors: Mapping[str, Any], group_size: int) -> None:
    """Refuse an int4 module whose headers do not fit each other or the group size."""
    parts = {
        suffix: (tensors[name + suffix]["dtype"], tuple(tensors[name + suffix]["shape"]))
        for suffix in QUANTIZED_SUFFIXES
        if name + suffix in tensors
    }
    for suffix, problem in header_problems(name, parts, group_size):
        raise RecipeError(
            f"{METHOD}: {name + suffix} {problem}. The checkpoint is damaged, or config.json was "
            f"not written with these weights; fetch both again, or run {_QUANTIZE!r} again"
        )


def header_problems(
    module: str,
    parts: Mapping[str, tuple[str, tuple[int, ...]]],
    group_size: int,
    columns: int | None = None,
) -> Iterator[tuple[str, str]]:
    """Say what is wrong with the headers of one int4 module.

    Args:
        module: its name.
        parts: safetensors dtype and shape by suffix; the packed weight is among them.
        group_size: by config.json.
        columns: K where it is known; else it is one of the two that the packed weight can have.

    Yields:
        The tensor's suffix, and what is wrong with it, as the rest of a sentence.
    """
    dtype, shape = parts[PACKED]
    if dtype != "U8" or len(shape) != 2 or 0 in shape:
        yield PACKED, f"is {dtype} {list(shape)}; it must be U8 [ceil(K / 2), N]"
        return
    half, rows = shape
    order = parts.get(ORDER)
    if order is not None and order[1] in ((2 * half,), (2 * half - 1,)):
        columns = columns or order[1][0]
    possible = (columns,) if columns else (2 * half, 2 * half - 1)
    layouts = [quantized_layout(rows, count, group_size) for count in possible]
    for suffix in (SCALE, ZERO_POINT):
        if suffix not in parts:
            yield suffix, f"is missing beside {module + PACKED}"
        elif suffix == SCALE and _differs_in_groups_alone(parts[suffix], layouts):
            yield (
                suffix,
                f"has {parts[suffix][1][0]} groups, and {possible[0]} columns in groups of "
                f"{group_size} are {layouts[0][suffix][1][0]}",
            )
        elif all(parts[suffix] != layout[suffix] for layout in layouts):
            (found, has), (dtype, shape) = parts[suffix], layouts[0][suffix]
            yield (
                suffix,
                f"is {found} {list(has)}; it must be {dtype} {list(shape)}, as {possible[0]} "
                f"columns in groups of {group_size} need",
            )
    if order is not None and order != ("I32", (possible[0],)):
        yield ORDER, f"is {order[0]} {list(order[1])}; it must be I32 [{possible[0]}]"


def _differs_in_groups_alone(
    found: tuple[str, tuple[int, ...]], layouts: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether scales are as they must be, but for another number of groups."""
    (dtype, shape), wanted = found, [layout[SCALE] for layout in layouts]
    alike = dtype == wanted[0][0] and len(shape) == 2 and shape[1] == wanted[0][1][1]
    return alike and found not in wanted


def int4_schemes(
    modules: Iterable[str],
    recipe: Recipe,
    kinds: Sequence[LayerKind] | None,
    tied_embeddings: bool,
) -> dict[str, Scheme]:
    """Scheme of each module that a checkpoint of ours holds in int4, by name.

    An LM head that is the embedding stays as it is, and so do experts that lie in one tensor.

    Args:
        modules: names of the modules that have a weight.
        recipe: what the weights are quantized by.
        kinds: kind of each layer, as ``Recipe.scheme`` wants it.
        tied_embeddings: the LM head shares the embedding's weights.

    Raises:
        RecipeError: as ``Recipe.scheme``.
    """
    found = {}
    for module in modules:
        tied = tied_embeddings and role_of(module) is Role.LM_HEAD
        if tied or (is_routed_expert(module) and mixture_of(module) is None):
            continue
        if scheme := recipe.scheme(module, kinds):
            found[module] = scheme
    return found


def require_shape(modules: Sequence[Int4Module], rows: int, columns: int, place: str) -> None:
    """Refuse weights whose shape is not the model's.

    Args:
        modules: what is served as one product, with N together.
        rows: N by the model's config.json.
        columns: K by the model's config.json.
        place: vLLM's name of the layer, for the message.

    Raises:
        RecipeError: the packed weights have another N or K.
    """
    shapes = [module.packed_shape for module in modules if module.packed_shape is not None]
    if len(shapes) < len(modules):
        return
    packed_rows = (columns + 1) // 2
    if sum(shape[1] for shape in shapes) == rows and {shape[0] for shape in shapes} == {
        packed_rows
    }:
        return
    found = ", ".join(
        f"{module.name + PACKED} is {list(shape)}"
        for module, shape in zip(modules, shapes, strict=True)
    )
    raise RecipeError(
        f"{METHOD}: {found}; {place} needs [{packed_rows}, {rows}] by config.json. The two are of "
        "different models; fetch both again"
    )


def require_known_version(version: Any) -> None:
    """Refuse a format that this release does not read.

    Args:
        version: ``format_version`` of config.json.

    Raises:
        RecipeError: it is not one, or of a later release.
    """
    if type(version) is int and version == FORMAT_VERSION:
        return
    later = type(version) is int and version > FORMAT_VERSION
    way_out = "upgrade it (pip install -U vllm-nanoquant)" if later else "fetch config.json again"
    raise RecipeError(
        f"{METHOD}: quantization_config.format_version = {version!r} in config.json; this release "
        f"of vllm-nanoquant reads version {FORMAT_VERSION}: {way_out}, or run {_QUANTIZE!r} again"
    )


def read_modules(
    tensors: Mapping[str, Any],
    recipe: Recipe,
    kinds: Sequence[LayerKind] | None,
    tied_embeddings: bool,
) -> dict[str, Int4Module]:
    """Read an int4 checkpoint's headers: exactly what the recipe names must be int4.

    Args:
        tensors: ``{"dtype": ..., "shape": [...]}`` by name.
        recipe: what config.json says the weights were quantized by.
        kinds: kind of each layer, as ``Recipe.scheme`` wants it.
        tied_embeddings: the LM head shares the embedding's weights and is never int4.

    Raises:
        RecipeError: tensors are missing or have impossible shapes or dtypes, or the recipe and the
            tensors disagree; the text names the tensor.
    """
    found: dict[str, Int4Module] = {}
    modules = modules_with_weights(tensors)
    schemes = int4_schemes(modules, recipe, kinds, tied_embeddings)
    for module in modules:
        scheme = schemes.get(module)
        if module + PACKED not in tensors:
            if scheme is not None:
                raise RecipeError(_should_be_int4(module, recipe))
            continue
        if module + WEIGHT in tensors:
            raise RecipeError(
                f"{METHOD}: the checkpoint has both {module + PACKED} and {module + WEIGHT}; files "
                "of two checkpoints are mixed in one folder, fetch it again into an empty one"
            )
        if scheme is None:
            tied = tied_embeddings and role_of(module) is Role.LM_HEAD
            raise RecipeError(_cannot_be_int4(module, tied, recipe))
        _require_sound(module, tensors, scheme.group_size)
        found[module] = Int4Module.from_headers(module, tensors)
    _refuse_strays(tensors, found)
    return found


def _should_be_int4(module: str, recipe: Recipe) -> str:
    return (
        f"{METHOD}: {module} should be int4 by config.json ({recipe.in_words}, "
        f"format_version {FORMAT_VERSION}), but the checkpoint has {module + WEIGHT} and "
        f"no {module + PACKED}; remove format_version to quantize while loading, or run "
        f"{_QUANTIZE!r} on the original"
    )


def _cannot_be_int4(module: str, tied: bool, recipe: Recipe) -> str:
    if tied:
        return (
            f"{METHOD}: {module + PACKED} is int4, but config.json has tie_word_embeddings true, "
            "so the LM head is the embedding, or a model_type whose LM head vLLM does not "
            "quantize; set tie_word_embeddings to false, or quantize again without lm_head"
        )
    return (
        f"{METHOD}: {module + PACKED} is int4, but by config.json ({recipe.in_words}) {module} "
        "stays in BF16; quantization_config was not written with these weights, fetch both "
        f"again, or run {_QUANTIZE!r} again"
    )


def _refuse_strays(tensors: Iterable[str], found: Mapping[str, Int4Module]) -> None:
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if f".{leaf}" in QUANTIZED_SUFFIXES and module not in found:
            raise RecipeError(
                f"{METHOD}: {name} belongs to an int4 weight, but {module + PACKED} is missing; "
                "the checkpoint is incomplete, fetch its files again"
            )


def require_every_file(tensors: Iterable[str], index: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint whose index promises tensors that no file has.

    Args:
        tensors: names in the files' headers.
        index: parsed model.safetensors.index.json; None where there is none.

    Raises:
        RecipeError: tensors are missing; the text names the file of the first.
    """
    promised = (index or {}).get("weight_map", {})
    present = set(tensors)
    missing = [name for name in promised if name not in present]
    if missing:
        files = sorted({str(promised[name]) for name in missing})
        raise RecipeError(
            f"{METHOD}: {len(missing)} tensors of model.safetensors.index.json are in no file, "
            f"the first is {missing[0]} of {', '.join(files[:_MAX_NAMES_IN_ERROR])}; fetch these "
            "files again"
        )
