"""A small Nemotron-H language model in plain PyTorch, for training.

The module tree is laid out so that ``state_dict()`` yields the tensor names of a stock
Nemotron-H checkpoint (``backbone.layers.0.mixer.in_proj.weight``, ...) with no renaming step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the model.

    They are awkward on purpose: 128, the usual group size of an int4 quantizer, divides neither
    ``hidden_size`` nor ``intermediate_size`` nor the output width of ``in_proj`` (1288), 64 does
    not divide ``vocab_size``, and everything that tensor parallelism splits is even.
    """

    vocab_size: int = 1801
    hidden_size: int = 288
    pattern: str = "M-M*-M-"
    intermediate_size: int = 672
    mamba_num_heads: int = 8
    mamba_head_dim: int = 64
    n_groups: int = 2
    ssm_state_size: int = 64
    conv_kernel: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    scan_chunk: int = 64

    @property
    def mamba_inner(self) -> int:
        """Width of the Mamba value path."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: values, B and C side by side."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size


class RMSNorm(nn.Module):
    """Root-mean-square norm, in fp32, over groups of the last dimension."""

    def __init__(self, width: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (..., width); the result is fp32."""
        grouped = x.float().unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped * scale).flatten(-2) * self.weight


def ssd_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Mamba-2's state-space recurrence from a zero state, computed chunk by chunk.

    Per head, with ``S`` a (head_dim, state) matrix::

        S[t] = exp(dt[t] * a) * S[t-1] + dt[t] * outer(x[t], b[t]);  y[t] = S[t] @ c[t]

    Args:
        x: values, (batch, time, groups, heads per group, head_dim).
        dt: positive step sizes, (batch, time, groups, heads per group), fp32.
        a: negative decay rates, (groups, heads per group), fp32.
        b: input maps, (batch, time, groups, state).
        c: output maps, (batch, time, groups, state).
        chunk: chunk length; a shorter last chunk is padded with steps of size 0.

    Returns:
        ``y``, shaped like ``x``.
    """
    time = x.shape[1]
    pad = -time % chunk

    def split(t: Tensor) -> Tensor:
        padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
        return padded.unflatten(1, (-1, chunk))

    # Letters: b batch, z chunk, l and s positions in a chunk, g group, r head, p value, n state.
    values = split(x * dt.unsqueeze(-1))
    b, c = split(b), split(c)
    log_decay = split(dt * a).permute(0, 1, 3, 4, 2).cumsum(-1)  # b z g r l
    total = log_decay[..., -1]  # b z g r

    # Inside a chunk: attention-like scores, weighted by the decay between the two positions. The
    # mask goes in before exp, since above the diagonal the difference is positive and overflows.
    gap = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = gap.masked_fill(~causal, -math.inf).exp()
    scores = torch.einsum("bzlgn,bzsgn->bzgls", c, b).unsqueeze(3) * decay
    y = torch.einsum("bzgrls,bzsgrp->bzlgrp", scores, values)

    # Across chunks: the state each chunk adds, carried to the start of every later chunk.
    to_end = (total.unsqueeze(-1) - log_decay).exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)
    added = torch.einsum("bzsgn,bzsgrp->bzgrpn", b, values * to_end)
    elapsed = total.cumsum(1)  # b z g r
    carry = (elapsed - total).unsqueeze(2) - elapsed.unsqueeze(1)  # b z(to) y(from) g r
    earlier = torch.ones(carry.shape[1], carry.shape[1], dtype=torch.bool, device=x.device).tril(-1)
    carry = carry.masked_fill(~earlier[..., None, None], -math.inf).exp()
    start = torch.einsum("bzygr,bygrpn->bzgrpn", carry, added)
    from_start = log_decay.exp().permute(0, 1, 4, 2, 3).unsqueeze(-1)
    y = y + torch.einsum("bzlgn,bzgrpn->bzlgrp", c, start) * from_start
    return y.flatten(1, 2)[:, :time]


class MambaMixer(nn.Module):
    """The Mamba-2 mixer: projection, short causal convolution, state-space scan, gated norm."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.mamba_inner + cfg.conv_dim + cfg.mamba_num_heads
        self.in_proj = nn.Linear(cfg.hidden_size, width, bias=False)
        self.conv1d = nn.Conv1d(cfg.conv_dim, cfg.conv_dim, cfg.conv_kernel, groups=cfg.conv_dim)
        self.A_log = nn.Parameter(torch.empty(cfg.mamba_num_heads))
        self.D = nn.Parameter(torch.ones(cfg.mamba_num_heads))
        self.dt_bias = nn.Parameter(torch.empty(cfg.mamba_num_heads))
        self.norm = RMSNorm(cfg.mamba_inner, cfg.norm_eps, groups=cfg.n_groups)
        self.out_proj = nn.Linear(cfg.mamba_inner, cfg.hidden_size, bias=False)

    def causal_conv(self, x: Tensor) -> Tensor:
        """Depthwise convolution of (batch, time, channels) that looks back only.

        Written as shifted products because a compiler fuses those into one pass, whereas the
        library's depthwise convolution is slow in the backward pass.
        """
        kernel = self.cfg.conv_kernel
        padded = F.pad(x, (0, 0, kernel - 1, 0))
        weight = self.conv1d.weight[:, 0]
        shifted = (padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(kernel))
        return sum(shifted, start=self.conv1d.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (batch, time, hidden) along time."""
        cfg = self.cfg
        gate, conv_in, dt = self.in_proj(x).split(
            [cfg.mamba_inner, cfg.conv_dim, cfg.mamba_num_heads], dim=-1
        )
        state = cfg.n_groups * cfg.ssm_state_size
        values, b, c = F.silu(self.causal_conv(conv_in)).split(
            [cfg.mamba_inner, state, state], dim=-1
        )
        heads = (cfg.n_groups, cfg.mamba_num_heads // cfg.n_groups)
        dt = F.softplus(dt.float() + self.dt_bias).unflatten(-1, heads)
        values = values.unflatten(-1, (*heads, cfg.mamba_head_dim))
        y = ssd_scan(
            values,
            dt,
            -self.A_log.exp().view(heads),
            b.unflatten(-1, (cfg.n_groups, -1)),
            c.unflatten(-1, (cfg.n_groups, -1)),
            cfg.scan_chunk,
        )
        y = (y + values * self.D.view(*heads, 1)).flatten(2)
        return self.out_proj(self.norm(y.float() * F.silu(gate.float())))


class MLPMixer(nn.Module):
    """Two projections with a squared ReLU between them."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, hidden) to the same shape, position by position."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class AttentionMixer(nn.Module):
    """Causal grouped-query attention; Nemotron-H gives it no position encoding."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.repeat = cfg.num_attention_heads // cfg.num_key_value_heads
        q_width = cfg.num_attention_heads * cfg.head_dim
        kv_width = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (batch, time, hidden)."""

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        k, v = (t.repeat_interleave(self.repeat, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


MIXERS: dict[str, type[nn.Module]] = {"M": MambaMixer, "-": MLPMixer, "*": AttentionMixer}


class Block(nn.Module):
    """One pre-norm residual layer."""

    def __init__(self, cfg: TinyConfig, kind: str, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mixer = MIXERS[kind](cfg)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add the mixer's output to the residual stream (batch, time, hidden)."""
        return x + self.dropout(self.mixer(self.norm(x)))


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, cfg: TinyConfig, dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(cfg, kind, dropout) for kind in cfg.pattern)
        self.norm_f = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Turn token ids (batch, time) into hidden states (batch, time, hidden)."""
        x = self.dropout(self.embeddings(ids))
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


class TinyNemotronH(nn.Module):
    """The language model: backbone and untied output projection."""

    def __init__(self, cfg: TinyConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = Backbone(cfg, dropout)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all weights from torch's global random state."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.cfg.initializer_range)
            elif isinstance(module, MambaMixer):
                self._reset_mamba(module)
        # Every layer writes into the residual stream once; keep its variance independent of depth.
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")):
                parameter.div_(math.sqrt(len(self.cfg.pattern)))

    def _reset_mamba(self, mixer: MambaMixer) -> None:
        cfg = self.cfg
        mixer.A_log.copy_(torch.arange(1, cfg.mamba_num_heads + 1).log())
        # Step sizes start log-uniform between the limits; dt_bias is softplus's inverse of them.
        low, high = math.log(cfg.time_step_min), math.log(cfg.time_step_max)
        dt = torch.empty(cfg.mamba_num_heads).uniform_(low, high).exp()
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, ids: Tensor) -> Tensor:
        """Return next-token logits, (batch, time, vocab), for ids (batch, time)."""
        return self.lm_head(self.backbone(ids))
