# SPDX-License-Identifier: Apache-2.0
"""What vLLM must hold a model to, so that it calls a function in Nemotron Nano v2's form."""

from collections.abc import Sequence
from typing import Any

from vllm_nanoquant.serving.toolcall import CLOSE, OPEN

__all__ = ["forced_calls"]


def forced_calls(
    tools: Sequence[Any], choice: Any, parallel: bool | None = True
) -> dict[str, Any] | None:
    """A structural tag of xgrammar for a forced call; None where the model may choose.

    Args:
        tools: of a chat request, or of the Responses API; what is no function is left out.
        choice: ``"auto"``, ``"required"``, ..., or an object that names a function.
        parallel: whether several calls are allowed.
    """
    functions = [getattr(tool, "function", tool) for tool in tools]
    functions = [function for function in functions if hasattr(function, "parameters")]
    several = choice == "required" and parallel is not False
    if not isinstance(choice, str) and choice is not None:
        name = getattr(getattr(choice, "function", choice), "name", None)
        functions = [function for function in functions if function.name == name]
    elif choice != "required":
        return None
    if not functions:
        return None
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call(place, f.name) for place, f in enumerate(functions)]},
        "$defs": {
            f"arguments{place}": _moved(
                function.parameters or {"type": "object", "properties": {}},
                f"#/$defs/arguments{place}",
            )
            for place, function in enumerate(functions)
        },
    }
    if not several:
        schema["maxItems"] = 1
    content = {"type": "json_schema", "json_schema": schema}
    tag = {"type": "tag", "begin": OPEN, "content": content, "end": CLOSE}
    return {"type": "structural_tag", "format": tag}


def _call(place: int, name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": [name]},
            "arguments": {"$ref": f"#/$defs/arguments{place}"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself begin at `root`, where it will be."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
