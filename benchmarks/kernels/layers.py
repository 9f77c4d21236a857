# SPDX-License-Identifier: Apache-2.0
"""The shapes and the numbers of tokens that are measured."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "Nemotron-Nano-9B-v2"
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192)
GROUP_SIZE = 128


@dataclass(frozen=True)
class Layer:
    """One weight [N, K].

    Attributes:
        name: what results call it.
        n: output features.
        k: input features.
        most_tokens: the most that a model sends through it at once; None: no limit.
    """

    name: str
    n: int
    k: int
    most_tokens: int | None = None

    def takes(self, tokens: int) -> bool:
        """Whether a model sends so many tokens through this layer at once."""
        return self.most_tokens is None or tokens <= self.most_tokens


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("in_proj", 22656, 4480),
        Layer("out_proj", 4480, 10240),
        Layer("mlp_up", 15680, 4480),
        Layer("mlp_down", 4480, 15680),
        Layer("qkv_proj", 7168, 4480),
        Layer("o_proj", 4480, 5120),
        # One row of logits per sequence.
        Layer("lm_head", 131072, 4480, most_tokens=128),
    )
}
QUICK_LAYERS = ("in_proj", "mlp_down")
QUICK_TOKENS = (1, 16, 512)


def parse_shape(text: str) -> Layer:
    """The layer that "2832x4480" (N x K) describes, named by that text.

    Raises:
        ValueError: the text is not two positive whole numbers with an x between them.
    """
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"{text!r} is not a shape NxK such as 2832x4480")
    return Layer(text, int(n), int(k))
