# SPDX-License-Identifier: Apache-2.0
"""Where a source comes from, what it says of itself, which of its files are copied."""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_nanoquant import families
from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.formats import SIDE_CONFIGS, with_side_configs
from vllm_nanoquant.checkpoint.formats.redhelix import WEIGHTS_FILE
from vllm_nanoquant.checkpoint.reader import Checkpoint, read_shard
from vllm_nanoquant.checkpoint.untrusted import (
    MAX_CONFIG,
    check_inside,
    open_regular,
    read_object,
)
from vllm_nanoquant.recipe import METHOD
from vllm_nanoquant.roles import LAYER_KEYS, LayerKind, layer_kinds

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "COPYRIGHT*", "USE_POLICY*")
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    *LICENCE_FILES,
)
"""Files that go with the weights. Anything else stays behind: code and pickles above all."""

_NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".so", ".sh", ".safetensors")
_DOWNLOADED = (
    *("*.safetensors", naming.INDEX, naming.CONFIG, naming.REPORT, "README.md"),
    *(*SIDE_CONFIGS, *COPIED_FILES),
)
_FOREIGN_SUFFIXES = (*naming.QUANTIZED_SUFFIXES, ".qweight", ".qzeros", ".weight_scale_inv")
_MODEL_ID = re.compile(r"[\w][\w.\-]*(?:/[\w][\w.\-]*)?")
_MAX_LAYERS = 10_000
_FRONT_MATTER_BYTES = 1 << 16
_INHERITED_FIELDS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "pipeline_tag",
    "base_model",
)


def find_source(name: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: the one named, or a model of the Hugging Face Hub.

    A model is taken from the Hub's cache, and downloaded first where the network allows; only
    safetensors, configuration, tokenizer and licence files are.

    Raises:
        UsageError: neither a folder nor a model that can be had.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision {printable(revision)} is for models of the Hub")
        return folder
    import huggingface_hub

    patterns = list(_DOWNLOADED)
    return from_hub(
        name,
        lambda: huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns),
    )


def from_hub(name: str, fetch: Callable[[], str]) -> Path:
    """Return what is fetched of a model of the Hugging Face Hub.

    Args:
        name: the model's id, as the user gave it.
        fetch: calls the Hub's library, and returns a path.

    Raises:
        UsageError: it is no id of a model, or the model cannot be had.
    """
    if name.startswith((".", "/", "~")) or not _MODEL_ID.fullmatch(name):
        raise UsageError(f"{printable(name)!r} is not a folder that exists")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(fetch())
    except LocalEntryNotFoundError:
        reason = "it is not in the Hugging Face cache, and the Hub cannot be reached"
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = printable(str(error).strip().splitlines()[0] if str(error).strip() else "unknown")
    raise UsageError(
        f"{printable(name)!r} is not a folder that exists, nor a model that can be had: {reason}"
    )


def open_source(folder: Path) -> Checkpoint:
    """Open a checkpoint with all that a tool which quantized it wrote beside the usual files.

    Raises:
        CheckpointError, UsageError: as `Checkpoint.open`; a tensor is there twice.
    """
    source = Checkpoint.open(folder)

    def read(name: str) -> dict[str, Any] | None:
        path = folder / name
        if not path.is_symlink() and not path.exists():
            return None
        check_inside(path)
        return read_object(path, MAX_CONFIG)

    shards = list(source.shards)
    if (folder / WEIGHTS_FILE).exists() and all(s.path.name != WEIGHTS_FILE for s in shards):
        extra = read_shard(folder, WEIGHTS_FILE)
        for name in extra.tensors:
            if name in source.tensors:
                raise CheckpointError(f"{at(extra.path, name)}: is in another file as well")
        shards.append(extra)
    return Checkpoint(folder, with_side_configs(source.config, read), shards)


def refuse_quantized(source: Checkpoint) -> None:
    """Refuse a source whose weights are quantized already.

    Raises:
        UsageError: by its config.json, by files beside it or by its tensors' names.
    """
    for config in (source.config, text_config(source.config)):
        quantization = config.get("quantization_config", config.get("compression_config"))
        if quantization is None:
            continue
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == METHOD and "format_version" not in quantization:
            continue  # a stock checkpoint that carries a recipe
        if method == METHOD:
            raise UsageError(
                f"{printable(str(source.folder))} is int4 in our format already; serve it as it "
                "is, or quantize the checkpoint that it was made from"
            )
        shown = repr(printable(str(method))) if isinstance(method, str) else "unnamed"
        raise UsageError(_already(source, f"config.json has a quantization_config ({shown})"))
    for name in SIDE_CONFIGS:
        if (source.folder / name).exists():
            raise UsageError(_already(source, f"it has a {name}"))
    for name in source.tensors:
        if name.endswith(_FOREIGN_SUFFIXES):
            raise UsageError(_already(source, f"it has a tensor {printable(name)}"))


def _already(source: Checkpoint, why: str) -> str:
    return (
        f"{printable(str(source.folder))} is quantized already: {why}. Quantizing twice loses "
        "accuracy; `nanoquant convert` takes over its integers as they are"
    )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of config.json, which may be all of it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def kinds_of(config: dict[str, Any]) -> tuple[LayerKind, ...] | None:
    """Kind of each layer by config.json, None where it does not say."""
    inner = text_config(config)
    for key in LAYER_KEYS:
        value = inner.get(key)
        if value is not None and not (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(word, str) for word in value))
        ):
            raise CheckpointError(f"{naming.CONFIG}: {key} is not a text or a list of words")
    if not isinstance(inner.get("attn_layer_indices"), list | None):
        raise CheckpointError(f"{naming.CONFIG}: attn_layer_indices is not a list")
    count = inner.get("num_hidden_layers")
    if count is not None and (not isinstance(count, int) or count > _MAX_LAYERS):
        raise CheckpointError(f"{naming.CONFIG}: num_hidden_layers is not a number of layers")
    return layer_kinds(SimpleNamespace(**inner))


def keeps_lm_head(config: dict[str, Any]) -> bool:
    """Whether the LM head stays as it is by config.json; see `families.keeps_lm_head`."""
    parts = (config, text_config(config))
    return any(families.keeps_lm_head(SimpleNamespace(**part)) for part in parts)


def files_to_copy(folder: Path) -> list[Path]:
    """Files of a checkpoint that belong beside its quantized weights, sorted by name.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder.
    """
    found = []
    for path in sorted(folder.iterdir()):
        allowed = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COPIED_FILES)
        if allowed and path.suffix.lower() not in _NEVER_COPIED and path.is_file():
            check_inside(path)
            found.append(path)
    return found


def inherited(source: Checkpoint, name: str) -> dict[str, Any]:
    """What a model card of the result says of where it comes from.

    Args:
        source: the stock checkpoint.
        name: what the user called it.

    Returns:
        ``base_model``, ``licence_files`` and those fields of the README's front matter that are
        texts or lists of texts.
    """
    fields = dict(_front_matter(source.folder))
    own_name = source.config.get("_name_or_path")
    if not Path(name).is_dir():
        fields["base_model"] = name
    elif isinstance(own_name, str) and _MODEL_ID.fullmatch(own_name):
        fields["base_model"] = own_name
    fields["licence_files"] = [
        path.name
        for path in files_to_copy(source.folder)
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in LICENCE_FILES)
    ]
    return fields


def _front_matter(folder: Path) -> Iterator[tuple[str, Any]]:
    """Fields between the two lines of dashes at the top of README.md, as far as they are known."""
    path = folder / "README.md"
    if not path.is_file():
        return
    check_inside(path)
    with open_regular(path) as file:
        text = (file.read(_FRONT_MATTER_BYTES) or b"").decode("utf-8", "replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if not found:
        return
    import yaml

    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    for key in _INHERITED_FIELDS:
        value = fields.get(key) if isinstance(fields, dict) else None
        texts = value if isinstance(value, list) else [value]
        if texts and all(isinstance(text, str) and len(text) < 500 for text in texts[:20]):
            yield key, value if isinstance(value, str) else texts[:20]


def rewritten_config(
    config: dict[str, Any], quantization: dict[str, Any], kinds: tuple[LayerKind, ...] | None
) -> str:
    """config.json of the quantized checkpoint.

    Args:
        config: the stock checkpoint's.
        quantization: the ``quantization_config`` to write.
        kinds: kind of each layer; a Nemotron-H that does not say in which dtype its state is
            cached gets float32, which vLLM would take for it anyway and other engines might not.
    """
    result = dict(config)
    # Names code that is not copied; without it the class that the engine has itself is used.
    result.pop("auto_map", None)
    result["quantization_config"] = quantization
    is_hybrid = kinds is not None and LayerKind.MAMBA in kinds
    is_hybrid &= text_config(config).get("model_type") == "nemotron_h"
    if is_hybrid and not text_config(config).get("mamba_ssm_cache_dtype"):
        if text_config(config) is not config:
            result["text_config"] = text_config(config) | {"mamba_ssm_cache_dtype": "float32"}
        else:
            result["mamba_ssm_cache_dtype"] = "float32"
    return json.dumps(result, indent=2) + "\n"
