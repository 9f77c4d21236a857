# SPDX-License-Identifier: Apache-2.0
"""What a running server says of itself."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import UsageError, printable

API_KEY = "OPENAI_API_KEY"
"""Variable with the key of a server that asks for one; vLLM's client reads it, too."""
_SECONDS = 10.0
_LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True)
class ServedModel:
    """A model that a vLLM server offers.

    Attributes:
        url: address of the server, without /v1.
        name: what requests call the model.
        root: folder or repository that it was loaded from; empty where the server does not say.
        max_model_len: most tokens of a sequence; None where the server does not say.
        vllm: version of the server's vLLM; None where it does not say.
    """

    url: str
    name: str
    root: str
    max_model_len: int | None
    vllm: str | None

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, as far as its address tells."""
        return urllib.parse.urlsplit(self.url).hostname in _LOCAL

    def tokenizer(self, given: str | None) -> str:
        """Folder or repository of the tokenizer.

        Raises:
            UsageError: nobody says, or the server means a folder that this machine does not have.
        """
        found = given or self.root
        if not found or (found.startswith((".", "/", "~")) and not Path(found).is_dir()):
            raise UsageError(
                f"the tokenizer of {printable(self.name)} is not here ({printable(found)!r}); name "
                "its folder or repository with --tokenizer"
            )
        return found


def find_model(url: str, name: str | None) -> ServedModel:
    """Ask a server for its models, and take one of them.

    Args:
        url: ``http://HOST:PORT``, with or without ``/v1``.
        name: the model's name; None takes the first.

    Raises:
        UsageError: no vLLM answers there, or it does not serve this model.
    """
    base = url.rstrip("/").removesuffix("/v1")
    listed = _get(f"{base}/v1/models").get("data")
    models = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    chosen = [each for each in models if name in (None, each.get("id"))]
    if not chosen:
        offered = ", ".join(printable(str(each.get("id"))) for each in models) or "none"
        raise UsageError(f"--model {name}: {base} does not serve it; its models: {offered}")
    length = chosen[0].get("max_model_len")
    try:
        version = _get(f"{base}/version").get("version")
    except UsageError:
        version = None  # a proxy before vLLM may not pass it on
    return ServedModel(
        url=base,
        name=str(chosen[0].get("id")),
        root=str(chosen[0].get("root") or ""),
        max_model_len=length if isinstance(length, int) else None,
        vllm=version if isinstance(version, str) else None,
    )


def _get(address: str) -> dict[str, Any]:
    # No proxy: a server that is measured is near.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address)
    if key := os.environ.get(API_KEY):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with opener.open(request, timeout=_SECONDS) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        hint = f"; put its key into {API_KEY}" if error.code in (401, 403) else ""
        raise UsageError(f"{address} answers {error.code} {error.reason}{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"no server answers at {address} ({reason}); start one with nanoquant serve MODEL, or "
            "give its address with --base-url"
        ) from None
    return found if isinstance(found, dict) else {}
