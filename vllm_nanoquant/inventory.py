# SPDX-License-Identifier: Apache-2.0
"""What lies in a checkpoint that is to be served, and what becomes of it.

Read in the front end from config.json and the headers, before a weight is. Imports no vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from vllm_nanoquant.checkpoint.naming import CONFIG, INDEX, PACKED, modules_with_weights
from vllm_nanoquant.checkpoint.stored import (
    FORMAT_KEYS,
    Int4Module,
    read_modules,
    require_every_file,
    require_known_version,
)
from vllm_nanoquant.command_line import RIGHT_FLAG
from vllm_nanoquant.recipe import METHOD, RecipeError, Scheme, ServingOptions
from vllm_nanoquant.roles import LayerKind

if TYPE_CHECKING:
    from vllm_nanoquant.foreign import ForeignWeights

Value = TypeVar("Value")

USUAL_FUSIONS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Projections that vLLM serves as one, by their name there, where a model does not say it."""

# Last parts of tensor names that only a quantized checkpoint has.
_QUANTIZED = frozenset(
    {"W_q", "qweight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"}
)
READABLE_METHODS = frozenset(
    {"awq", "gptq", "compressed-tensors", "fp8", "modelopt", "modelopt_fp4", "modelopt_mixed"}
)
"""Names of other methods, in config.json, whose checkpoints `formats` may be able to read."""
_SERVING_ALONE = frozenset({"max_capture_size"})


def is_fused(module: str) -> bool:
    """Whether a module's name is that of several projections in one."""
    return module.rpartition(".")[2] in USUAL_FUSIONS


@dataclass(frozen=True)
class Inventory:
    """A checkpoint as it is to be served. Plain data: vLLM sends it to its workers.

    Attributes:
        options: the recipe in force.
        int4: modules that are int4 already, by the checkpoint's names; empty where the headers
            could not be read; None for a checkpoint that is quantized while it loads.
        foreign: how to read what another tool quantized; None for our own formats.
        fused: modules that stand for several projections in the checkpoint already.
    """

    options: ServingOptions
    int4: Mapping[str, Int4Module] | None = None
    foreign: ForeignWeights | None = None
    fused: frozenset[str] = frozenset()

    @property
    def in_words(self) -> str:
        """Where the int4 weights come from, for people."""
        return self.options.in_words if self.foreign is None else self.foreign.format.in_words

    @property
    def is_int4(self) -> bool:
        """Whether weights are loaded as int4, and not all quantized while they load."""
        return bool(self.int4) if self.foreign is not None else self.int4 is not None

    @property
    def fingerprint(self) -> str:
        """Digest of what compiled graphs depend on: the recipe, and whose columns are reordered."""
        facts = [self.options.fingerprint]
        facts += sorted(name for name, module in (self.int4 or {}).items() if module.ordered)
        if self.foreign is not None:
            facts += sorted(f"{name} {scheme}" for name, scheme in self.foreign.schemes.items())
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def scheme(self, module: str, kinds: Sequence[LayerKind] | None) -> Scheme | None:
        """Scheme of a module, or None when it stays as it is; arguments as ``Recipe.scheme``."""
        if self.foreign is not None:
            return self.foreign.schemes.get(module)
        return self.options.scheme(module, kinds)

    def with_renamed_modules(self, rename: Callable[[str], str]) -> Self:
        """Return the same with each name and pattern twice: as the checkpoint has it, and renamed.

        Args:
            rename: from a name or pattern of the checkpoint, without ``re:``, to another's.
        """
        foreign = self.foreign
        if foreign is not None:
            foreign = replace(foreign, schemes=_both_names(foreign.schemes, rename))
        int4 = None if self.int4 is None else _both_names(self.int4, rename)
        return replace(
            self,
            options=self.options.with_renamed_patterns(rename),
            int4=int4,
            foreign=foreign,
            fused=self.fused | {rename(name) for name in self.fused},
        )


def _both_names(modules: Mapping[str, Value], rename: Callable[[str], str]) -> dict[str, Value]:
    return {**modules, **{rename(name): value for name, value in modules.items()}}


@dataclass(frozen=True)
class Model:
    """What the inventory needs to know of a model.

    Attributes:
        name: as the user gave it, for errors.
        tensors: ``{"dtype": ..., "shape": [...]}`` by name; empty where no header could be read.
        read_json: content of a JSON file of the checkpoint by name, or None.
        kinds: kind of each layer, or None.
        tied_embeddings: whether the LM head shares the embedding's weights.
    """

    name: str
    tensors: Mapping[str, Any]
    read_json: Callable[[str], Mapping[str, Any] | None]
    kinds: Sequence[LayerKind] | None
    tied_embeddings: bool


def parse_options(config: Mapping[str, Any]) -> Inventory:
    """Read ``quantization_config`` as far as it goes without the checkpoint.

    Raises:
        RecipeError: an option that is unknown or has an impossible value, or a format of int4
            checkpoints that this release does not know.
    """
    if config.get("quant_method", METHOD) not in ("", METHOD):
        return Inventory(ServingOptions())  # another tool's, whose options are not ours
    options = {key: value for key, value in config.items() if key not in FORMAT_KEYS}
    if "format_version" not in config:
        return Inventory(ServingOptions.parse(options))
    require_known_version(config["format_version"])
    return Inventory(ServingOptions.parse(options), int4={})


def take_inventory(given: Inventory, claimed: str | None, model: Model) -> Inventory:
    """Find out what lies in the checkpoint, and hold the options against it.

    Args:
        given: what ``parse_options`` made of the settings that reached us.
        claimed: the other method that these settings name, or None.
        model: the checkpoint.

    Raises:
        RecipeError: options that contradict the checkpoint or fit no module of it, or a checkpoint
            that contradicts itself.
        FormatError: it is quantized in a way that cannot be read.
    """
    found = _take_inventory(given, claimed, model)
    names = [
        *modules_with_weights(model.tensors),
        *(found.foreign.schemes if found.foreign else ()),
    ]
    return replace(found, fused=frozenset(name for name in names if is_fused(name)))


def _take_inventory(given: Inventory, claimed: str | None, model: Model) -> Inventory:
    if given.int4 is not None:
        return _own(given.options, model)
    names = model.tensors.keys()
    if claimed or any(name.rpartition(".")[2] in _QUANTIZED for name in names):
        config = model.read_json(CONFIG) or {}
        written = config.get("quantization_config")
        if isinstance(written, Mapping) and written.get("quant_method") == METHOD:
            return _own(_same_recipe(given.options, written), model)
        foreign = _foreign(given.options, config, model)
        if foreign is not None:
            return foreign
        _refuse_unexplained(claimed, model)
    _refuse_gptq(given.options, model)
    _check_patterns(given.options, model)
    _refuse_nothing(given.options, model)
    return given


def _own(options: ServingOptions, model: Model) -> Inventory:
    """Inventory of an int4 checkpoint of ours."""
    if not model.tensors:
        return Inventory(options, int4={})
    _check_patterns(options, model)
    require_every_file(model.tensors, model.read_json(INDEX))
    modules = read_modules(model.tensors, options, model.kinds, model.tied_embeddings)
    return Inventory(options, int4=modules)


def _same_recipe(given: ServingOptions, written: Mapping[str, Any]) -> ServingOptions:
    """Options of an int4 checkpoint's config.json that others have replaced.

    vLLM puts what ``--hf-overrides`` gives in the place of config.json's ``quantization_config``.
    What concerns serving alone is kept; the recipe must be the same.

    Raises:
        RecipeError: it is another.
    """
    own = parse_options({"format_version": None, **written}).options
    for name in sorted(given.model_fields_set - _SERVING_ALONE):
        if getattr(given, name) != getattr(own, name):
            raise RecipeError(
                f"{METHOD}: {RIGHT_FLAG}.{name} is {getattr(given, name)!r}, but the checkpoint's "
                f"weights are int4 already, quantized with {name} {getattr(own, name)!r}; leave "
                "the option out, or run 'nanoquant quantize' with it on the original"
            )
    kept = given.model_fields_set & _SERVING_ALONE
    return own.model_copy(update={name: getattr(given, name) for name in kept})


def _foreign(options: ServingOptions, config: Mapping[str, Any], model: Model) -> Inventory | None:
    # Not at the top: formats pull in much that other checkpoints do not need.
    from vllm_nanoquant.foreign import find_foreign

    foreign = find_foreign(
        config, model.tensors, model.read_json, options, model.kinds, model.tied_embeddings
    )
    if foreign is None:
        return None
    if foreign.format.requantized_modules:
        _refuse_gptq(options, model)
    return Inventory(options, foreign.int4, foreign)


def _refuse_unexplained(claimed: str | None, model: Model) -> None:
    packed = next((name for name in model.tensors if name.endswith(PACKED)), None)
    if packed is not None:
        raise RecipeError(
            f"{METHOD}: the checkpoint has the int4 tensor {packed}, but its config.json has no "
            f"quantization_config of {METHOD}; fetch config.json again, or run 'nanoquant "
            "quantize' again"
        )
    if claimed is not None:
        raise RecipeError(
            f"{METHOD}: quantization_config.quant_method is {claimed!r}, but config.json does not "
            "say so and no tensor is stored in that way; remove it"
        )


def _refuse_gptq(options: ServingOptions, model: Model) -> None:
    if options.algorithm == "gptq":
        raise RecipeError(
            f"{METHOD}: algorithm 'gptq' needs calibration data and cannot quantize while loading; "
            f"run 'nanoquant quantize {model.name} OUTPUT --algorithm gptq' and serve OUTPUT, or "
            "choose 'minmax' or 'mse'"
        )


def _refuse_nothing(options: ServingOptions, model: Model) -> None:
    """Refuse a recipe that would serve every module as it is, as ``ssm`` does on a transformer."""
    modules = modules_with_weights(model.tensors)
    if modules and not any(options.scheme(module, model.kinds) for module in modules):
        raise RecipeError(
            f"{METHOD}: {options.in_words} covers no module of {model.name}; choose preset "
            "'balanced' or 'full', or serve it without --quantization"
        )


def _check_patterns(options: ServingOptions, model: Model) -> None:
    modules = modules_with_weights(model.tensors)
    if modules:
        options.check_against(modules)
