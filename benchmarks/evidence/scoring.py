# SPDX-License-Identifier: Apache-2.0
"""A model's predictions beside the BF16 model's, token by token, with errors over windows of text.

The BF16 model is kept as the hidden states before its LM head, not as logits: those of half a
million tokens would take 34 GB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_model.model import TinyNemotronH

POSITIONS = (0, 128, 512, 1024, 2048, 4096, 8192, 12288, 16384)
"""Edges of the ranges of positions that long windows are reported for."""
BOOTSTRAPS = 2000
_LOGIT_TOKENS = 8192
_BATCH_TOKENS = 32768


@dataclass(frozen=True)
class TokenScores:
    """Of every predicted token; column t is of the token at position t + 1.

    Attributes:
        loss: -log p, nats, fp64 [windows, T - 1].
        divergence: KL(BF16 || model), nats, fp64 [windows, T - 1].
        agreed: 1 where both find the same token the likeliest, fp64 [windows, T - 1].
    """

    loss: np.ndarray
    divergence: np.ndarray
    agreed: np.ndarray


class Windows:
    """Windows of text, and the BF16 model's predictions of them."""

    def __init__(self, model: TinyNemotronH, ids: torch.Tensor) -> None:
        """Run the BF16 model.

        Args:
            model: with its own weights.
            ids: int64 [windows, T], on the model's device.
        """
        self._ids = ids
        self._head = model.lm_head.weight.detach().clone()
        self._hidden = list(self._run(model))
        self.stock = self.score(model)

    @torch.inference_mode()
    def score(self, model: TinyNemotronH) -> TokenScores:
        """A model's predictions, beside the BF16 model's."""
        found: list[tuple[np.ndarray, ...]] = []
        head = model.lm_head
        for hidden, reference, ids in zip(
            self._run(model), self._hidden, self._ids.split(self._rows), strict=True
        ):
            wanted = ids[:, 1:].flatten()
            parts = zip(
                hidden.flatten(0, 1).split(_LOGIT_TOKENS),
                reference.flatten(0, 1).split(_LOGIT_TOKENS),
                wanted.split(_LOGIT_TOKENS),
                strict=True,
            )
            scores = [self._compare(head(one), other, token) for one, other, token in parts]
            columns = (torch.cat(column).view(len(ids), -1) for column in zip(*scores, strict=True))
            found.append(tuple(column.double().cpu().numpy() for column in columns))
        return TokenScores(*(np.concatenate(column) for column in zip(*found, strict=True)))

    @property
    def _rows(self) -> int:
        """Windows that are run together."""
        return max(1, _BATCH_TOKENS // self._ids.shape[1])

    @torch.inference_mode()
    def _run(self, model: TinyNemotronH) -> Any:
        """Hidden states before the LM head, [rows, T - 1, hidden] at a time."""
        for ids in self._ids.split(self._rows):
            yield model.backbone(ids[:, :-1])

    def _compare(
        self, logits: torch.Tensor, reference: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_q = logits.float().log_softmax(-1)
        log_p = F.linear(reference, self._head).float().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        agreed = log_p.argmax(-1) == log_q.argmax(-1)
        return -log_q.gather(1, wanted[:, None])[:, 0], divergence, agreed


def bootstrap_error(by_window: np.ndarray, seed: int = 0) -> float:
    """Standard error of the mean over windows: its spread if other windows had been drawn."""
    draws = np.random.default_rng(seed).integers(0, len(by_window), (BOOTSTRAPS, len(by_window)))
    return float(by_window[draws].mean(axis=1).std())


def figures(scores: TokenScores, stock: TokenScores) -> dict[str, float]:
    """The means over all tokens, each with the error over windows, which are taken in pairs.

    ``perplexity_change`` is the perplexity over BF16's, less 1; its error is that of the loss.
    """
    more = scores.loss.mean(1) - stock.loss.mean(1)
    divergence, agreed = scores.divergence.mean(1), scores.agreed.mean(1)
    return {
        "perplexity": math.exp(scores.loss.mean()),
        "perplexity_error": math.exp(scores.loss.mean()) * bootstrap_error(scores.loss.mean(1)),
        "loss_over_bf16": float(more.mean()),
        "loss_over_bf16_error": bootstrap_error(more),
        "perplexity_change": math.expm1(more.mean()),
        "perplexity_change_error": math.exp(more.mean()) * bootstrap_error(more),
        "kl_divergence": float(divergence.mean()),
        "kl_divergence_error": bootstrap_error(divergence),
        "agreement": float(agreed.mean()),
        "agreement_error": bootstrap_error(agreed),
    }


def by_window(scores: TokenScores) -> dict[str, list[float]]:
    """Mean loss and KL divergence of each window: any two cases can be compared in pairs."""
    return {
        "loss_by_window": scores.loss.mean(1).round(6).tolist(),
        "kl_by_window": scores.divergence.mean(1).round(8).tolist(),
    }


def by_position(
    scores: TokenScores, stock: TokenScores, edges: Sequence[int] = POSITIONS
) -> list[dict[str, float]]:
    """The same figures for each range of positions in the window."""
    last = scores.loss.shape[1]
    result = []
    for first, stop in pairwise(edges):
        if first >= last:
            break
        columns = slice(first, min(stop, last))
        part, reference = (
            TokenScores(s.loss[:, columns], s.divergence[:, columns], s.agreed[:, columns])
            for s in (scores, stock)
        )
        result.append({"first": first, "stop": min(stop, last), **figures(part, reference)})
    return result
