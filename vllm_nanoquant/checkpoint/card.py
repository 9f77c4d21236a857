# SPDX-License-Identifier: Apache-2.0
"""A model card for a quantized checkpoint, with what is known and measured and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import UsageError, at, printable
from vllm_nanoquant.checkpoint.inspect import inspect
from vllm_nanoquant.checkpoint.report import read_report
from vllm_nanoquant.checkpoint.untrusted import MAX_REPORT, read_object

PROJECT = "vllm-nanoquant"
_MAX_FIGURES = 200


def make_card(folder: Path, results: Sequence[Path] = ()) -> str:
    """Text of a README.md for a checkpoint that `quantize` or `convert` wrote.

    Args:
        folder: the checkpoint, with its report.
        results: files that the benchmarks wrote; their figures are listed as they are.

    Raises:
        UsageError: not a folder, or there is no report, so nothing is known.
        CheckpointError: the checkpoint, the report or a result file is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{printable(str(folder))} is not a folder")
    report = read_report(folder)
    if report is None:
        raise UsageError(
            f"{printable(str(folder))} has no {naming.REPORT}; only what `nanoquant quantize` or "
            "`nanoquant convert` wrote can have a card"
        )
    source = report.get("source")
    source = source if isinstance(source, dict) else {}
    name = folder.resolve().name
    parts = [
        _front_matter(source),
        f"# {_plain(name)}\n",
        *_origin(source),
        *_sizes(folder, report),
        *_serving(name),
        *_measured(results),
        *_licence(source),
    ]
    return "\n".join(parts)


def _plain(text: object) -> str:
    """A text from elsewhere, without control characters and what Markdown or HTML would act on."""
    return "".join(c for c in printable(str(text)) if c not in "`<>[]|*#\\")


def _texts(value: object) -> list[str]:
    """A text or a list of texts as a list; anything else as an empty one."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _front_matter(source: dict[str, Any]) -> str:
    """YAML for the Hub. JSON texts are YAML texts, and cannot break out."""
    fields: dict[str, Any] = {
        key: source[key]
        for key in ("license", "license_name", "license_link", "language", "pipeline_tag")
        if key in source
    }
    if "license" not in fields and (files := _texts(source.get("licence_files"))):
        fields |= {"license": "other", "license_link": files[0]}
    if isinstance(source.get("base_model"), str | list):
        fields["base_model"] = source["base_model"]
        fields["base_model_relation"] = "quantized"
    fields |= {"library_name": "vllm", "tags": ["int4", "w4a16", PROJECT]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _origin(source: dict[str, Any]) -> Iterator[str]:
    names = _texts(source.get("base_model")) or _texts(source.get("name"))
    name = ", ".join(map(_plain, names)) or "a model whose name is not recorded"
    yield (
        f"int4 weights (16-bit activations) of **{name}**, for vLLM with the plugin {PROJECT}.\n"
    )


def _sizes(folder: Path, report: dict[str, Any]) -> Iterator[str]:
    summary = inspect(folder)
    recipe = summary.recipe or {}
    yield "## Recipe\n"
    yield "| | |\n|---|---|"
    for key in ("preset", "group_size", "algorithm"):
        yield f"| {key.replace('_', ' ')} | {_plain(recipe.get(key))} |"
    for key in ("ignore", "overrides"):
        if recipe.get(key) and len(recipe[key]) <= 20:
            yield f"| {key} | {_plain(json.dumps(recipe[key]))} |"
        elif recipe.get(key):
            yield f"| {key} | {len(recipe[key])} patterns, see config.json |"
    if summary.relative_error is not None:
        yield f"| mean relative error of a weight | {summary.relative_error:.4f} |"
    versions = report.get("versions")
    if isinstance(versions, dict):
        made_with = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in sorted(versions.items()))
        yield f"| made with | {made_with} |"
    yield "\n## Size\n"
    yield "| part | format | modules | bits per weight | MB |\n|---|---|---|---|---|"
    for row in [*summary.rows, summary.total]:
        bits = f"{row.bits:.2f}" if row.bits else ""
        yield f"| {row.role} | {row.format} | {row.modules} | {bits} | {row.nbytes / 1e6:.2f} |"
    size = report.get("bytes")
    before = size.get("before") if isinstance(size, dict) else None
    if isinstance(before, int):
        yield f"\nThe source has {before / 1e6:.2f} MB."
    yield ""


def _serving(name: str) -> Iterator[str]:
    yield "## How to serve\n"
    yield f"```\npip install {PROJECT}\nvllm serve path/to/{_plain(name)}\n```\n"


def _measured(results: Sequence[Path]) -> Iterator[str]:
    """Figures of result files, as they are: device, packages, and every number with its path."""
    if not results:
        return
    yield "## Measured\n"
    for path in results:
        result = read_object(path, MAX_REPORT)
        figures = list(_figures(result.get("results", result), ""))
        if not figures:
            raise UsageError(f"{at(path)}: holds no figure")
        yield f"{_plain(path.name)}, on {_plain(result.get('device', 'an unnamed device'))}:\n"
        yield "| figure | value |\n|---|---|"
        for label, value in figures[:_MAX_FIGURES]:
            yield f"| {_plain(label)} | {value:.6g} |"
        if len(figures) > _MAX_FIGURES:
            yield f"\n{len(figures) - _MAX_FIGURES} more figures are in the file."
        yield ""


def _figures(value: Any, label: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _figures(inner, f"{label}, {key}" if label else key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield label.replace("_", " "), value


def _licence(source: dict[str, Any]) -> Iterator[str]:
    files = [_plain(name) for name in _texts(source.get("licence_files"))]
    named = ", ".join(_texts(source.get("license_name")) or _texts(source.get("license")))
    yield "## Licence\n"
    if named or files:
        words = [f"that of the base model ({_plain(named)})" if named else "that of the base model"]
        words += [f"see {', '.join(files)}"] if files else []
        yield "The licence is " + "; ".join(words) + ".\n"
    else:
        yield "The source names no licence; ask its authors.\n"
