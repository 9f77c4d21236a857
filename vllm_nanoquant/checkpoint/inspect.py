# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, by config.json and headers alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, printable
from vllm_nanoquant.checkpoint.header import TensorEntry
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.report import read_report
from vllm_nanoquant.checkpoint.source import kinds_of, open_source, text_config
from vllm_nanoquant.checkpoint.structure import parse_recipe, stored_recipe
from vllm_nanoquant.recipe import METHOD, Recipe
from vllm_nanoquant.roles import role_of

_EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "word_embeddings")


@dataclass
class Row:
    """Modules of one purpose that are stored in one way.

    Attributes:
        role: "mamba", "mlp", "attention", "lm_head", "embedding", "experts" or "other".
        format: "int4 g128", or the dtypes of the tensors.
        modules: how many.
        weights: elements that they stand for; None where the format does not tell.
        nbytes: bytes of all their tensors.
    """

    role: str
    format: str
    modules: int = 0
    weights: int | None = 0
    nbytes: int = 0

    @property
    def bits(self) -> float | None:
        """Bits per weight, scales and all."""
        return 8 * self.nbytes / self.weights if self.weights else None


@dataclass(frozen=True)
class Summary:
    """What a checkpoint is.

    Attributes:
        kind: in words, as "int4 in our format, version 1".
        recipe: the recipe it was made by; None where it is not ours.
        relative_error: the mean of its weights' relative errors by its report; None without one.
        files: number of its safetensors files.
        rows: by role and format, the largest first.
    """

    kind: str
    recipe: dict[str, Any] | None
    relative_error: float | None
    files: int
    rows: list[Row]

    @property
    def total(self) -> Row:
        """Everything together."""
        weights = [row.weights for row in self.rows]
        known = None if None in weights else sum(filter(None, weights))
        return Row(
            "total",
            "",
            sum(row.modules for row in self.rows),
            known,
            sum(row.nbytes for row in self.rows),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data of it all."""
        rows = [asdict(row) | {"bits": row.bits} for row in [*self.rows, self.total]]
        *parts, total = rows
        return {
            "kind": self.kind,
            "recipe": self.recipe,
            "mean_relative_error": self.relative_error,
            "files": self.files,
            "parts": parts,
            "total": total,
        }


def inspect(folder: Path) -> Summary:
    """Say what a checkpoint is. Reads no weight.

    Raises:
        CheckpointError, UsageError: as `source.open_source`.
    """
    checkpoint = open_source(folder)
    quantization = stored_recipe(checkpoint.config)
    recipe = parse_recipe(quantization) if quantization else None
    rows: dict[tuple[str, str], Row] = {}
    modules: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in checkpoint.tensors.values():
        modules[entry.name.rpartition(".")[0]].append(entry)
    known = recipe is not None or kind_of(checkpoint) == _STOCK
    for module, entries in modules.items():
        form, weights = _form(module, entries, recipe, checkpoint)
        role = _role(module)
        row = rows.setdefault((role, form), Row(role, form))
        row.modules += 1
        row.nbytes += sum(entry.nbytes for entry in entries)
        row.weights = row.weights + weights if known and row.weights is not None else None
    report = read_report(folder)
    errors = [
        record["relative_error"]
        for record in (report or {}).get("tensors", {}).values()
        if isinstance(record.get("relative_error"), float)
    ]
    return Summary(
        kind=kind_of(checkpoint),
        recipe=recipe.model_dump(mode="json") if recipe else None,
        relative_error=sum(errors) / len(errors) if errors else None,
        files=len(checkpoint.shards),
        rows=sorted(rows.values(), key=lambda row: -row.nbytes),
    )


_STOCK = "stock, not quantized"


def kind_of(checkpoint: Checkpoint) -> str:
    """What a checkpoint is, in words."""
    if stored_recipe(checkpoint.config) is not None:
        return f"int4 in our format, version {naming.FORMAT_VERSION}"
    # Not at the top: every foreign format is loaded with it.
    from vllm_nanoquant.checkpoint.formats import detect

    try:
        found = detect(checkpoint.config, checkpoint.tensors)
    except CheckpointError as error:
        return f"quantized in a form that cannot be converted ({error})"
    if found is not None:
        return f"{found.name}, which `nanoquant convert` reads"
    for config in (checkpoint.config, text_config(checkpoint.config)):
        method = config.get("quantization_config")
        name = method.get("quant_method") if isinstance(method, dict) else None
        if isinstance(name, str) and name != METHOD:
            return f"quantized by {printable(name)}, which is not supported"
    return _STOCK


def _role(module: str) -> str:
    if naming.is_routed_expert(module):
        return "experts"
    if module.rpartition(".")[2] in _EMBEDDINGS:
        return "embedding"
    return role_of(module) or "other"


def _form(
    module: str, entries: list[TensorEntry], recipe: Recipe | None, checkpoint: Checkpoint
) -> tuple[str, int]:
    """How a module is stored, and how many weights it has."""
    tensors = {entry.name.removeprefix(module): entry for entry in entries}
    packed = tensors.get(naming.PACKED)
    if recipe is None or packed is None or len(packed.shape) != 2:
        return "+".join(sorted({entry.dtype for entry in entries})), sum(e.numel for e in entries)
    scheme = recipe.scheme(module, kinds_of(checkpoint.config))
    group = scheme.group_size if scheme else "?"
    ordered = ", ordered" if naming.ORDER in tensors else ""
    return f"int4 g{group if group != -1 else ' row'}{ordered}", 2 * packed.numel
