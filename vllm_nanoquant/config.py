# SPDX-License-Identifier: Apache-2.0
"""vLLM's view of a recipe: the ``QuantizationConfig`` of ``nanoquant_w4a16``.

vLLM makes one in the front end, calls ``maybe_update_config`` on it there, and sends a pickled copy
to every worker. So whatever can be refused is refused in ``maybe_update_config``: before a process
is started, and before a weight is read.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from vllm_nanoquant import __version__, compat, compilation
from vllm_nanoquant.checkpoint.naming import is_routed_expert
from vllm_nanoquant.checkpoint.stored import Int4Module
from vllm_nanoquant.command_line import RIGHT_FLAG
from vllm_nanoquant.families import LayerNames, keeps_lm_head
from vllm_nanoquant.inventory import (
    READABLE_METHODS,
    USUAL_FUSIONS,
    Inventory,
    Model,
    parse_options,
    take_inventory,
)
from vllm_nanoquant.ledger import Ledger
from vllm_nanoquant.recipe import METHOD, RecipeError, Scheme, ServingOptions
from vllm_nanoquant.requirements import MIN_CAPABILITY
from vllm_nanoquant.roles import Role, layer_kinds, role_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = compat.init_logger(__name__)

# Options that no other method has.
_OURS_ALONE = frozenset({"preset", "max_capture_size"})


class NanoquantConfig(QuantizationConfig):
    """int4 weights in groups, bf16 activations.

    A BF16 checkpoint is quantized while it loads; one that is int4 already is loaded as it is.
    """

    def __init__(self, inventory: Inventory | None = None, claimed: str | None = None) -> None:
        """Make the config of one engine.

        Args:
            inventory: the recipe, and what is known of the checkpoint by it; None for the default
                recipe (preset ``balanced``) on a checkpoint that is quantized while it loads.
            claimed: another method, which the checkpoint's settings name and we were asked to read.
        """
        super().__init__()
        compat.require_supported_vllm()
        self._claimed = claimed
        self._layer_kinds: tuple[Any, ...] | None = None
        self._keeps_lm_head = False
        self._names = LayerNames()
        self._built: Counter[str] = Counter()
        self._squared_relu = False
        self._use(inventory or Inventory(ServingOptions()))

    def _use(self, inventory: Inventory) -> None:
        self.options = inventory.options
        self.ledger = Ledger(inventory.in_words, inventory.is_int4)
        self._inventory = inventory
        # The inventory in vLLM's names for modules, once the model has said what they are.
        self._here = inventory

    def __repr__(self) -> str:
        return f"NanoquantConfig({self.options!r})"

    @classmethod
    def get_name(cls) -> Any:
        """Name of the method, as in ``--quantization`` and config.json."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes; float32 is for exact tests on the CPU."""
        on_cpu = [torch.float32] if current_platform.is_cpu() else []
        return [torch.bfloat16, torch.float16, *on_cpu]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability, times ten, of the oldest supported GPU."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file beside config.json: a stock checkpoint has none, and needs none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NanoquantConfig":
        """Read ``quantization_config`` of config.json or of ``--hf-overrides``.

        Raises:
            RecipeError: an option that is unknown or has an impossible value, or a format of int4
                checkpoints that this release does not know.
        """
        method = config.get("quant_method") or METHOD
        return cls(parse_options(config), claimed=None if method == METHOD else method)

    @classmethod
    def from_config_file(cls, config_file: str) -> "NanoquantConfig":
        """Read the options from the JSON file that ``quantization_config_file`` names.

        Raises:
            RecipeError: the file cannot be read, or as ``from_config``.
        """
        try:
            text = Path(config_file).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"{METHOD}: quantization_config_file {config_file!r} cannot be read: "
                f"{error.strerror}"
            ) from error
        return cls.from_config_dict_json(text, place=f"quantization_config_file {config_file!r}")

    @classmethod
    def from_config_dict_json(
        cls, config_dict_json: str, place: str = "quantization_config_dict_json"
    ) -> "NanoquantConfig":
        """Read the options from JSON text.

        Raises:
            RecipeError: not a JSON object, or as ``from_config``.
        """
        try:
            config = json.loads(config_dict_json)
        except ValueError as error:
            raise RecipeError(f"{METHOD}: {place} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise RecipeError(f"{METHOD}: {place} holds {config!r}, not a JSON object of options")
        return cls.from_config(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim options given without a ``quant_method``, and checkpoints of tools that we read.

        They are beside ``--quantization`` of ours, and also without it when one of them is known to
        nobody else: ``--hf-overrides`` has put them in the place of a ``quantization_config`` that
        named us. What other tools quantized is claimed only where ``--quantization`` asks for it.

        vLLM asks this for every quantized model it serves, so it is quick and never raises.
        """
        if not isinstance(hf_quant_cfg, dict):
            return None
        method = hf_quant_cfg.get("quant_method")
        if method:
            return METHOD if user_quant == METHOD and method in READABLE_METHODS else None
        given = hf_quant_cfg.keys() - {"quant_method"}
        unmistakable = given & _OURS_ALONE and given <= ServingOptions.model_fields.keys()
        if user_quant == METHOD or (user_quant is None and unmistakable):
            return METHOD
        return None

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: "PretrainedConfig | None" = None,
        revision: str | None = None,
    ) -> None:
        """Refuse what cannot work, learn what the recipe needs of the model, set the hooks.

        Called once, in the front end. The recipe's fingerprint goes into ``hf_config``, which vLLM
        hashes into the key of its compiled artefacts: a changed recipe never meets a stale one.

        Raises:
            RecipeError: options in the wrong place, patterns that fit no module, options that
                contradict an int4 checkpoint, or headers that contradict its config.json.
            ValueError: ``VLLM_USE_BYTECODE_HOOK`` is on.
        """
        compilation.reject_bytecode_hook()
        self._refuse_composition()
        revision = compat.revision_of(hf_config, revision)
        if hf_config is not None:
            self._refuse_stray_options(hf_config)
            self._layer_kinds = layer_kinds(hf_config)
            self._keeps_lm_head = keeps_lm_head(hf_config)
            self._names = LayerNames.of(hf_config)
            self._squared_relu = getattr(hf_config, "mlp_hidden_act", None) == "relu2"
        tensors = compat.checkpoint_tensors(model_name, revision)
        if not tensors and (self.options.patterns or self._inventory.int4 is not None):
            logger.warning(
                "%s: no safetensors header of %s could be read, so neither the patterns of ignore "
                "and overrides nor the tensors of an int4 checkpoint are checked before loading; a "
                "misspelt pattern has no effect",
                METHOD,
                model_name,
            )
        read_json = partial(compat.checkpoint_json, model_name, revision)
        model = Model(model_name, tensors, read_json, self._layer_kinds, self._keeps_lm_head)
        self._use(take_inventory(self._inventory, self._claimed, model))
        if hf_config is not None:
            hf_config.nanoquant_fingerprint = f"{__version__}-{self._inventory.fingerprint}"
        compilation.install_hook()

    def _refuse_composition(self) -> None:
        """Refuse vLLM's own online quantization on top of ours (vLLM 0.30 and later offer it)."""
        if getattr(self, "online_quantization_config", None) is not None:
            raise RecipeError(
                f"{METHOD}: --quantization-config is for vLLM's own methods and cannot be combined "
                f"with {METHOD}; remove it, and give our options to {RIGHT_FLAG}"
            )

    @staticmethod
    def _refuse_stray_options(hf_config: "PretrainedConfig") -> None:
        """Options one level too high: ``--hf-overrides.preset``."""
        for name in (*ServingOptions.model_fields, METHOD):
            # Some models' configs have a group_size of their own.
            if name != "group_size" and getattr(hf_config, name, None) is not None:
                right = RIGHT_FLAG if name == METHOD else f"{RIGHT_FLAG}.{name}"
                raise RecipeError(
                    f"{METHOD}: --hf-overrides.{name} does not reach the recipe; use {right}"
                )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn vLLM's names for the modules that the recipe names and the checkpoint holds."""
        self._here = self._inventory.with_renamed_modules(
            lambda name: compat.map_name(hf_to_vllm_mapper, name)
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer, called by every worker as it builds the model.

        Raises:
            RecipeError: the recipe splits modules that vLLM serves as one, fp16 activations would
                overflow, or our options are in ``--additional-config``.
        """
        # Not at the top: the layer classes pull in most of vLLM, and register() must stay cheap.
        from vllm_nanoquant.layers.dispatch import method_for

        self._check_engine()
        prefix = self._name_of(prefix)
        method = method_for(layer, prefix, self.scheme_for, self.ledger, self.stored_as)
        if method is not None and self._inventory.foreign is not None:
            compat.translate_weights(method, self._inventory.foreign.translate)
        return method

    def scheme_for(self, prefix: str) -> Scheme | None:
        """Scheme of a module by vLLM's name for it; fused modules must agree on one.

        Raises:
            RecipeError: the parts of a fused module have different schemes.
        """
        parts = self._parts_of(prefix)
        scheme, *others = {self._here.scheme(part, self._layer_kinds) for part in parts}
        if others:
            raise RecipeError(
                f"{METHOD}: {', '.join(parts)} are served as one product, {prefix}, and need the "
                "same treatment; name all of them, or none, in ignore and overrides"
            )
        if self._keeps_lm_head and role_of(prefix) is Role.LM_HEAD and scheme:
            logger.info("%s: lm_head shares the embedding's weights and stays as it is", METHOD)
            return None
        int4 = self._here.int4 if self._inventory.foreign is None else None
        if int4 and is_routed_expert(prefix) and prefix not in int4:
            return None  # experts in one tensor, which 'nanoquant quantize' leaves as it is
        return scheme

    def stored_as(self, prefix: str) -> tuple[Int4Module, ...] | None:
        """Find what the checkpoint's headers say of a module, by vLLM's name for it.

        Returns:
            One entry for each of the modules that vLLM serves as this one, none where no header
            could be read; None where the module is to be quantized while it loads.
        """
        int4 = self._here.int4
        if int4 is None:
            return None
        names = [prefix] if prefix in int4 else self._parts_of(prefix)
        found = tuple(int4[name] for name in names if name in int4)
        if self._inventory.foreign is not None and not found:
            return None
        return found

    def _name_of(self, prefix: str) -> str:
        """Name under which the layer that vLLM builds next as `prefix` will get its weights."""
        names = self._names.names(prefix)
        self._built[prefix] += 1
        return names[(self._built[prefix] - 1) % len(names)]

    def _parts_of(self, prefix: str) -> list[str]:
        """Names of the modules that vLLM serves as one under this name."""
        if prefix in self._here.fused:
            return [prefix]
        parent, _, leaf = prefix.rpartition(".")
        fusions = USUAL_FUSIONS | self.packed_modules_mapping
        return [f"{parent}.{part}".lstrip(".") for part in fusions.get(leaf, [leaf])]

    def _check_engine(self) -> None:
        """Refuse what only a worker can know, before the layer at hand is built.

        Raises:
            RecipeError: fp16 activations where they overflow, or our options in
                ``--additional-config``.
        """
        compilation.disable_bytecode_hook()
        engine = get_current_vllm_config_or_none()
        if engine is None:
            # vLLM 0.26 reloads weights: an attention layer asks again, outside of any engine's
            # settings. They were checked when the layer was built.
            return
        if not current_platform.support_static_graph_mode():
            # vLLM chooses no capture sizes there, so the front end has not been asked.
            about_states = compilation.rounded_states(engine)
            if about_states:
                logger.warning_once(about_states)
        extra = engine.additional_config if isinstance(engine.additional_config, dict) else {}
        for name in (*ServingOptions.model_fields, METHOD, "nanoquant"):
            if name in extra:
                raise RecipeError(
                    f"{METHOD}: --additional-config {name!r} does not reach the recipe; "
                    f"use {RIGHT_FLAG}"
                )
        load_format = engine.load_config.load_format
        if self._inventory.foreign is not None and not compat.reads_by_default_loader(load_format):
            raise RecipeError(
                f"{METHOD}: --load-format {load_format} cannot read what another tool quantized; "
                "leave it out, or run 'nanoquant convert' and serve the result"
            )
        half = engine.model_config is not None and engine.model_config.dtype == torch.float16
        if half and self._squared_relu:
            raise RecipeError(
                f"{METHOD}: this model's squared ReLU overflows float16 (65504) for inputs above "
                "256; use --dtype bfloat16"
            )


def register_config() -> None:
    """Register ``NanoquantConfig`` under its name, once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(NanoquantConfig)
