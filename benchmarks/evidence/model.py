# SPDX-License-Identifier: Apache-2.0
"""The trained model as plain PyTorch, its weights rounded in place and put back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_model.export import load_exported
from tiny_model.model import TinyConfig, TinyNemotronH
from torch import nn

from benchmarks.evidence.cases import PARTS, Case
from benchmarks.evidence.methods import Rounded, needs_text, round_weight, to_e4m3
from vllm_nanoquant.recipe import Scheme, matches
from vllm_nanoquant.roles import LayerKind, layer_kinds

BATCH_TOKENS = 32768
"""Calibration tokens that pass through a layer together."""


def calibration_ids(pool: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """The sequences that a case is calibrated with, of a pool [sequences, T]: [samples, T]."""
    random = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=random)[:samples]]


def read_model(folder: Path, device: torch.device) -> tuple[TinyNemotronH, tuple[LayerKind, ...]]:
    """A checkpoint of tools/train_small_model.py, in fp32, and the kinds of its layers.

    Raises:
        ValueError: config.json names no kinds of layers.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"pattern": "hybrid_override_pattern", "norm_eps": "rms_norm_eps"}
    known = {field.name: names.get(field.name, field.name) for field in fields(TinyConfig)}
    cfg = TinyConfig(**{key: config[name] for key, name in known.items() if name in config})
    kinds = layer_kinds(SimpleNamespace(**config))
    if kinds is None:
        raise ValueError(f"{folder / 'config.json'} has no hybrid_override_pattern")
    return load_exported(folder, cfg).to(device), kinds


class Subject:
    """The model whose weights are rounded, case by case.

    Attributes:
        model: the model; between cases it has its own weights.
    """

    def __init__(
        self, model: TinyNemotronH, kinds: tuple[LayerKind, ...], calibration: torch.Tensor
    ) -> None:
        """Keep the model's own weights aside.

        Args:
            model: in fp32, with bf16 values.
            kinds: of its layers.
            calibration: token ids to draw sequences from, int64 [sequences, T].
        """
        self.model = model
        self._kinds = kinds
        self._calibration = calibration
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self._linears = linears
        self._stock = {name: module.weight.detach().clone() for name, module in linears.items()}

    @contextmanager
    def quantized(self, case: Case, samples: int) -> Iterator[dict[str, Any]]:
        """The model as a case wants it, for the time of the block; yields figures of its weights.

        Args:
            case: which weights, and how.
            samples: calibration sequences, unless the case says otherwise.
        """
        targets = {name: scheme for name in self._linears if (scheme := self._scheme(case, name))}
        if not targets:
            raise ValueError(f"{case.name} quantizes nothing")
        hooks = []
        try:
            if needs_text(case.method):
                rounded = self._calibrate(case, targets, case.samples or samples)
            else:
                rounded = {name: self._round(case, name, targets[name], None) for name in targets}
            if case.method == "fp8-w8a8":
                hooks = [
                    self._linears[name].register_forward_pre_hook(
                        lambda _, inputs: (to_e4m3(inputs[0]),)
                    )
                    for name in targets
                ]
            yield self._figures(rounded)
        finally:
            for hook in hooks:
                hook.remove()
            for name in targets:
                self._linears[name].weight.data.copy_(self._stock[name])

    def _scheme(self, case: Case, name: str) -> Scheme | None:
        if case.only is not None and not matches(case.only, name):
            return None
        return case.recipe.scheme(name, self._kinds)

    def _round(
        self, case: Case, name: str, scheme: Scheme, hessian: torch.Tensor | None
    ) -> Rounded:
        """Round one weight, in place."""
        stock = self._stock[name]
        rows = self._rows(case.part, stock.shape[0])
        found = round_weight(stock[rows], case.method, scheme.group_size, hessian)
        self._linears[name].weight.data[rows] = found.weight
        return found

    def _rows(self, part: str | None, rows: int) -> slice:
        """Rows of in_proj that make one of its parts."""
        if part is None:
            return slice(0, rows)
        cfg = self.model.cfg
        state = cfg.n_groups * cfg.ssm_state_size
        widths = (cfg.mamba_inner, cfg.mamba_inner, state, state, cfg.mamba_num_heads)
        start = sum(widths[: PARTS.index(part)])
        return slice(start, start + widths[PARTS.index(part)])

    @torch.no_grad()
    def _calibrate(
        self, case: Case, targets: dict[str, Scheme], samples: int
    ) -> dict[str, Rounded]:
        """Layer by layer, each with the inputs that the quantized layers before it give."""
        model = self.model
        ids = calibration_ids(self._calibration, samples, case.seed)
        rows = max(1, BATCH_TOKENS // ids.shape[1])
        states = [model.backbone.embeddings(part) for part in ids.split(rows)]
        steps: list[tuple[str, nn.Module]] = [
            (f"backbone.layers.{i}.", layer) for i, layer in enumerate(model.backbone.layers)
        ]
        steps += [("backbone.norm_f", model.backbone.norm_f), ("lm_head", model.lm_head)]
        rounded = {}
        for prefix, module in steps:
            names = [name for name in targets if name.startswith(prefix)]
            if names:
                hessians = self._hessians(names, module, states)
                for name in names:
                    rounded[name] = self._round(case, name, targets[name], hessians.pop(name))
            if prefix != "lm_head":
                states = [module(state) for state in states]
        return rounded

    def _hessians(
        self, names: list[str], module: nn.Module, states: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """X^T X of the linears' inputs while a module runs."""
        sums: dict[str, torch.Tensor] = {}

        def add(name: str, inputs: torch.Tensor) -> None:
            x = inputs.reshape(-1, inputs.shape[-1])
            product = x.t() @ x
            sums[name] = sums[name] + product if name in sums else product

        hooks = [
            self._linears[name].register_forward_pre_hook(
                lambda _, inputs, name=name: add(name, inputs[0])
            )
            for name in names
        ]
        try:
            for state in states:
                module(state)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    def _figures(self, rounded: dict[str, Rounded]) -> dict[str, Any]:
        error = norm = bits = 0.0
        weights = 0
        for name, one in rounded.items():
            now, stock = self._linears[name].weight.double(), self._stock[name].double()
            error += float(((now - stock) ** 2).sum())
            norm += float((stock**2).sum())
            bits += one.bits * one.weight.numel()
            weights += one.weight.numel()
        return {
            "modules": len(rounded),
            "weights": weights,
            "bits": round(bits / weights, 4),
            "relative_error": (error / norm) ** 0.5,
        }
