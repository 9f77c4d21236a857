# SPDX-License-Identifier: Apache-2.0
"""Make JSON schemas of KServe's resource definitions, to check the files in docker/ against.

From a checkout of KServe, at the release that is to be checked against:

    python tools/kserve_schemas.py CHECKOUT/config/crd/full tests/deploy/schemas
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from _console import Failure, guarded

KINDS = {"servingruntimes": "ServingRuntime", "inferenceservices": "InferenceService"}
"""Files of KServe, and the kinds that they define."""

_SHARED = 200
"""A part that is this long, in characters, and occurs twice is written once."""
_OPEN = "x-kubernetes-preserve-unknown-fields"


def closed(node: Any) -> Any:
    """A schema that refuses fields it does not know, as the API server does when it is strict.

    Rules in the Common Expression Language and other ``x-kubernetes-`` keys mean nothing to a JSON
    schema and are left out, as are descriptions.
    """
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if key == "properties":  # below it, every key is the name of a field
            kept[key] = {name: closed(field) for name, field in value.items()}
        elif key != "description" and not key.startswith("x-kubernetes-"):
            kept[key] = value if key in ("required", "enum") else closed(value)
    if "properties" in kept and "additionalProperties" not in kept and not node.get(_OPEN):
        kept["additionalProperties"] = False
    return kept


def compact(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with parts that occur more than once under ``$defs``."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            counts[text] += 1
            if counts[text] > 1:
                return
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                count(child)

    definitions: dict[str, Any] = {}

    def replaced(node: Any, inside: bool = False) -> Any:
        if isinstance(node, list):
            return [replaced(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if counts[text] > 1 and len(text) >= _SHARED and "type" in node and not inside:
            name = hashlib.sha256(text.encode()).hexdigest()[:8]
            if name not in definitions:
                definitions[name] = {}  # keeps its place in the order
                definitions[name] = replaced(node, inside=True)
            return {"$ref": f"#/$defs/{name}"}
        return {key: replaced(value) for key, value in node.items()}

    count(schema)
    return {**replaced(schema, inside=True), "$defs": definitions}


def schema_of(definition: dict[str, Any], kind: str) -> dict[str, Any]:
    """The schema of one kind, in the version that is stored.

    Args:
        definition: a CustomResourceDefinition.
        kind: the one that it defines.
    """
    version = next(v for v in definition["spec"]["versions"] if v["storage"])
    full = version["schema"]["openAPIV3Schema"]
    group = definition["spec"]["group"]
    properties = {
        "apiVersion": {"const": f"{group}/{version['name']}"},
        "kind": {"const": kind},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": closed(full["properties"]["spec"]),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{kind} of KServe ({group}/{version['name']})",
        **compact(
            {
                "type": "object",
                "required": ["apiVersion", "kind", "metadata", "spec"],
                "properties": properties,
                "additionalProperties": False,
            }
        ),
    }


def main() -> None:
    """Write one file for each kind."""
    parser = argparse.ArgumentParser(description="Make JSON schemas of KServe's definitions.")
    parser.add_argument("definitions", type=Path, help="KServe's folder config/crd/full")
    parser.add_argument("target", type=Path, help="folder to write into")
    given = parser.parse_args()
    for name, kind in KINDS.items():
        source = given.definitions / f"serving.kserve.io_{name}.yaml"
        if not source.exists():
            raise Failure(
                f"{source} is missing: give the folder config/crd/full of KServe's checkout"
            )
        definition = yaml.safe_load(source.read_text(encoding="utf-8"))
        text = json.dumps(schema_of(definition, kind), separators=(",", ":"))
        (given.target / f"{kind}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guarded(main))
