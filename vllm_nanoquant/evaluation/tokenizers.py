# SPDX-License-Identifier: Apache-2.0
"""A model's tokenizer without the code that may lie beside it.

Tasks whose texts the harness makes to measure, as RULER's, load the tokenizer with remote code
switched on. What they are given here has none: files of data alone, without the reference to code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_nanoquant.evaluation.errors import EvaluationError

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CODE = "auto_map"


@contextmanager
def without_code(source: str) -> Iterator[Path]:
    """Copy the data files of a tokenizer to a temporary folder.

    Args:
        source: folder, or model id of the Hugging Face Hub.

    Raises:
        EvaluationError: it has no tokenizer.json, or needs code of its own.
    """
    with tempfile.TemporaryDirectory(prefix="nanoquant-tokenizer-") as name:
        folder = Path(name)
        for file in (_TOKENIZER, _CONFIG, *_OTHERS):
            path = _find(source, file)
            if path is not None:
                (folder / file).write_bytes(path.read_bytes())
        if not (folder / _TOKENIZER).is_file():
            raise EvaluationError(
                f"{source} has no {_TOKENIZER}; give a folder that has one with --tokenizer"
            )
        _remove_code(folder / _CONFIG)
        yield folder


def _find(source: str, file: str) -> Path | None:
    """A file of a folder, or of a model of the Hub; None where it is not there."""
    if Path(source).is_dir():
        path = Path(source) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, file))
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise EvaluationError(
            f"the tokenizer of {source} cannot be had ({str(error).splitlines()[0]}); give a "
            "folder with --tokenizer"
        ) from None


def _remove_code(path: Path) -> None:
    """Leave a configuration that names no class of somebody else's code."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config.pop(_CODE, None)
    # Reads any tokenizer.json, whatever class of the model's own the configuration named.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config), encoding="utf-8")
