# SPDX-License-Identifier: Apache-2.0
"""What the headers of an int4 checkpoint say, held against its recipe before a weight is read.

Knows neither torch tensors nor vLLM: names, dtypes and shapes in, errors or plain data out.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    modules_with_weights,
)
from vllm_nanoquant.quantize.groups import group_count
from vllm_nanoquant.recipe import METHOD, Recipe, RecipeError
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
        """Read the headers of one module and hold them against each other.

        Args:
            name: full name of the module, which has a packed weight.
            tensors: ``{"dtype": ..., "shape": [...]}`` by name, for the whole checkpoint.

        Raises:
            RecipeError: a tensor is missing or its dtype or shape is impossible.
        """
        for suffix in (SCALE, ZERO_POINT):
            if name + suffix not in tensors:
                raise RecipeError(
                    f"{METHOD}: {name + suffix} is missing beside {name + PACKED}; the checkpoint "
                    "is incomplete, fetch its files again"
                )
        packed, scale = (tensors[name + suffix]["shape"] for suffix in (PACKED, SCALE))
        groups = scale[0] if len(scale) == 2 else 0
        rows = packed[1] if len(packed) == 2 else 0
        # Only the packed weight's first size depends on K; it is held against the model's later.
        expected = {
            PACKED: ("U8", [packed[0] if packed else 0, rows]),
            SCALE: ("BF16", [groups, rows]),
            ZERO_POINT: ("BF16", [groups, rows]),
        }
        for suffix, (dtype, shape) in expected.items():
            _require(name + suffix, tensors[name + suffix], dtype, shape)
        ordered = name + ORDER in tensors
        if ordered:
            order = tensors[name + ORDER]
            columns = order["shape"][0] if len(order["shape"]) == 1 else 0
            allowed = columns if (columns + 1) // 2 == packed[0] else 2 * packed[0]
            _require(name + ORDER, order, "I32", [allowed])
        return cls(name, (packed[0], rows), ordered)


def _require_group_size(name: str, tensors: Mapping[str, Any], group_size: int) -> None:
    """Refuse scales whose number fits neither of the two K that the packed weight can have."""
    packed_rows, groups = (tensors[name + suffix]["shape"][0] for suffix in (PACKED, SCALE))
    columns = 2 * packed_rows
    possible = {group_count(count, group_size) for count in (columns - 1, columns)}
    if groups not in possible:
        raise RecipeError(
            f"{METHOD}: {name + SCALE} has {groups} groups, and {columns} columns in groups of "
            f"{group_size} are {max(possible)}: quantization_config in config.json was not written "
            f"with these weights; fetch both again, or run {_QUANTIZE!r} again"
        )


def _require(name: str, header: Mapping[str, Any], dtype: str, shape: Sequence[int]) -> None:
    found = header["dtype"], list(header["shape"])
    if found != (dtype, list(shape)) or 0 in shape:
        raise RecipeError(
            f"{METHOD}: {name} is {found[0]} {found[1]}; it must be {dtype} {list(shape)}. The "
            f"checkpoint is damaged or was not written by {_QUANTIZE!r}; fetch or make it again"
        )


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
    for module in modules_with_weights(tensors):
        tied = tied_embeddings and role_of(module) is Role.LM_HEAD
        scheme = None if tied else recipe.scheme(module, kinds)
        is_int4, is_dense = module + PACKED in tensors, module + WEIGHT in tensors
        if is_int4:
            found[module] = _read_module(module, tensors, is_dense)
            _refuse_what_cannot_be_served(module, tied, scheme is None, recipe)
            if scheme is not None:
                _require_group_size(module, tensors, scheme.group_size)
        elif scheme is not None and not is_routed_expert(module):
            raise RecipeError(
                f"{METHOD}: {module} should be int4 by config.json ({recipe.in_words}, "
                f"format_version {FORMAT_VERSION}), but the checkpoint has {module + WEIGHT} and "
                f"no {module + PACKED}; remove format_version to quantize while loading, or run "
                f"{_QUANTIZE!r} on the original"
            )
    _refuse_strays(tensors, found)
    return found


def _read_module(module: str, tensors: Mapping[str, Any], is_dense: bool) -> Int4Module:
    if is_dense:
        raise RecipeError(
            f"{METHOD}: the checkpoint has both {module + PACKED} and {module + WEIGHT}; files of "
            "two checkpoints are mixed in one folder, fetch it again into an empty one"
        )
    return Int4Module.from_headers(module, tensors)


def _refuse_what_cannot_be_served(module: str, tied: bool, unnamed: bool, recipe: Recipe) -> None:
    if tied:
        raise RecipeError(
            f"{METHOD}: {module + PACKED} is int4, but config.json has tie_word_embeddings true, "
            "so the LM head is the embedding; set it to false, or quantize again without lm_head"
        )
    if is_routed_expert(module):
        raise RecipeError(
            f"{METHOD}: {module + PACKED}: routed experts in int4 cannot be served yet; run "
            f'{_QUANTIZE!r} on the original again with ignore ["*.experts.*"]'
        )
    if unnamed:
        raise RecipeError(
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
