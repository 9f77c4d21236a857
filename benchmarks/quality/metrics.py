# SPDX-License-Identifier: Apache-2.0
"""How far a language model's next-token distributions are from the text and from another model's.

Everything is kept window by window, so that two models can be compared in pairs: how much two
windows of text differ hides how little two models do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Scores:
    """Figures of one model, one entry for each window of text.

    Attributes:
        tokens: tokens that were predicted: all but the first of the window.
        loss: sum over them of -log p(token | the ones before it), nats.
        divergence: sum over their positions of KL(reference || model), nats.
        agreed: positions at which both find the same token the likeliest.
    """

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, window: torch.Tensor) -> None:
        """Add a window.

        Args:
            logits: [T, vocabulary] of the model, in fp32; row t predicts token t + 1.
            reference: the same of the model to compare with.
            window: token ids, int64 [T].
        """
        log_q = logits[:-1].log_softmax(dim=-1)
        log_p = reference[:-1].log_softmax(dim=-1)
        wanted = window[1:, None]
        self.tokens.append(len(wanted))
        self.loss.append(-log_q.gather(1, wanted).double().sum().item())
        self.divergence.append((log_p.exp() * (log_p - log_q)).double().sum().item())
        self.agreed.append(int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()))

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss of a token."""
        return math.exp(sum(self.loss) / sum(self.tokens))

    @property
    def mean_divergence(self) -> float:
        """KL divergence, nats for each token."""
        return sum(self.divergence) / sum(self.tokens)

    @property
    def agreement(self) -> float:
        """Share of positions with the same likeliest token."""
        return sum(self.agreed) / sum(self.tokens)

    @property
    def loss_by_window(self) -> list[float]:
        """Mean loss of a token in each window."""
        return [loss / count for loss, count in zip(self.loss, self.tokens, strict=True)]

    @property
    def divergence_by_window(self) -> list[float]:
        """Mean KL divergence of a token in each window."""
        return [kl / count for kl, count in zip(self.divergence, self.tokens, strict=True)]


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of first - second over the windows, and its standard error.

    Raises:
        ValueError: not the same number of windows, or fewer than two.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} windows: a standard error needs at least 2")
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """How far two sets of log probabilities [..., vocabulary] are from each other.

    Returns:
        Root mean square, 99.9th percentile and greatest of |a - b|, mean KL(a || b) in nats, and
        the share of places with the same likeliest token.
    """
    apart = (a - b).abs()
    kl = (a.exp() * (a - b)).sum(dim=-1).double().mean()
    kth = max(1, round(0.999 * apart.numel()))
    return {
        "rms": apart.double().square().mean().sqrt().item(),
        "p999": apart.flatten().kthvalue(kth).values.item(),
        "greatest": apart.max().item(),
        "kl_divergence": kl.item(),
        "agreement": (a.argmax(dim=-1) == b.argmax(dim=-1)).double().mean().item(),
    }
