# SPDX-License-Identifier: Apache-2.0
"""What a model says of itself in its small files: config.json and the chat template."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import UsageError, printable
from vllm_nanoquant.checkpoint.untrusted import MAX_CONFIG, read_object
from vllm_nanoquant.launch.given import Given

_CONFIG = "config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_MAX_TEMPLATE = 1 << 20
# What configs call the sizes of a Mamba layer's state: Nemotron-H, Granite and Falcon-H1, Zamba2.
_MAMBA_KEYS = ("ssm_state_size", "mamba_d_state", "mamba_n_heads", "n_mamba_heads")
_MODELSCOPE = "VLLM_USE_MODELSCOPE"


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is loaded.

    Attributes:
        config: config.json; None where this package cannot read it, as that of a bucket.
        template: the chat template; empty where there is none, or none that can be read.
    """

    config: Mapping[str, Any] | None
    template: str = ""

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of config.json, which may be all of it."""
        config = self.config or {}
        inner = config.get("text_config")
        return inner if isinstance(inner, Mapping) else config

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """``quantization_config``, where the checkpoint carries one."""
        for part in (self.config or {}, self.text_config):
            found = part.get("quantization_config", part.get("compression_config"))
            if isinstance(found, Mapping):
                return found
        return None

    @property
    def has_mamba(self) -> bool:
        """Whether there are Mamba layers, whose states vLLM keeps."""
        return any(self.text_config.get(key) for key in _MAMBA_KEYS)

    @property
    def state_dtype(self) -> str | None:
        """The dtype that config.json asks for Mamba's states; None where it does not."""
        found = self.text_config.get("mamba_ssm_cache_dtype")
        return found if isinstance(found, str) else None


def read_facts(given: Given) -> ModelFacts:
    """Read a model's small files, from its folder or from the Hugging Face Hub.

    Raises:
        UsageError: the model is neither a folder with a checkpoint nor one that can be had.
        CheckpointError: its config.json is damaged.
    """
    name = given.model_name
    if _is_elsewhere(name):
        return ModelFacts(None, _template(given, None))
    revision = _text(given.value("--revision"))
    config_home = _text(given.value("--hf-config-path")) or name
    path = _file(config_home, _CONFIG, revision, required=True)
    assert path is not None
    tokenizer = _text(given.value("--tokenizer")) or name
    return ModelFacts(read_object(path, MAX_CONFIG), _template(given, tokenizer, revision))


def _is_elsewhere(name: str) -> bool:
    """Whether vLLM takes the model from a place that this package does not read."""
    elsewhere = os.environ.get(_MODELSCOPE, "").lower() in ("1", "true")
    return "://" in name or (elsewhere and not Path(name).exists())


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _template(given: Given, tokenizer: str | None, revision: str | None = None) -> str:
    """The chat template: the user's, else the tokenizer's."""
    own = _text(given.value("--chat-template"))
    if own is not None:
        path = Path(own)
        # vLLM takes a template on the command line as well.
        return _read_text(path) if len(own) < 4096 and path.is_file() else own
    if tokenizer is None:
        return ""
    path_of_template = _file(tokenizer, _TEMPLATE, revision)
    if path_of_template is not None:
        return _read_text(path_of_template)
    path_of_config = _file(tokenizer, _TOKENIZER_CONFIG, revision)
    if path_of_config is None:
        return ""
    template = read_object(path_of_config, MAX_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = " ".join(str(each) for each in template)
    return template if isinstance(template, str) else ""


def _read_text(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MAX_TEMPLATE)


def _file(model: str, name: str, revision: str | None, required: bool = False) -> Path | None:
    """A file of a checkpoint, fetched from the Hub if need be; None where there is none."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / name
        if path.is_file():
            return path
        if required:
            raise UsageError(f"{printable(model)} is a folder without {name}: not a checkpoint")
        return None
    if folder.exists():
        raise UsageError(
            f"{printable(model)} is a file; nanoquant serves folders in Hugging Face's form, and "
            "models of the Hub"
        )
    return _file_of_the_hub(model, name, revision, required)


def _file_of_the_hub(model: str, name: str, revision: str | None, required: bool) -> Path | None:
    # Not at the top: it takes a while, and a folder does not need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # What is in the cache is good enough, and at once.
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(model, name, revision=revision, local_files_only=True))
        return Path(hf_hub_download(model, name, revision=revision))
    except HFValidationError:
        reason = "that is no name of a model either"
    except GatedRepoError:
        reason = "its owner grants access: ask for it on its page, then run hf auth login"
    except RepositoryNotFoundError:
        reason = "the Hub has no such model, or hides it without a login (hf auth login)"
    except RevisionNotFoundError:
        reason = f"the model has no revision {printable(str(revision))}"
    except LocalEntryNotFoundError:
        reason = "it is not in the Hugging Face cache, and the Hub cannot be reached"
    except EntryNotFoundError:
        reason = f"the model has no {name}"
    except (HfHubHTTPError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = printable(lines[0])
    if not required:
        return None
    raise UsageError(f"{printable(model)!r} is not a folder that exists, and on the Hub: {reason}")
