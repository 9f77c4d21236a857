# SPDX-License-Identifier: Apache-2.0
"""The training loop: by the clock, resumable, and it goes on after what can go wrong unattended.

A step whose gradient is not finite is left out; many in a row take the last checkpoint back, with
half the learning rate. If memory runs out, a step is cut into smaller parts. If torch.compile
fails, the model runs as it is.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_model.model import TinyConfig, TinyNemotronH
from torch import Tensor, nn

from small_model.clock import Clock, learning_rate
from small_model.data import LONG_CONTEXT, Prepared
from small_model.loss import summed_loss

_LOG_SECONDS = 10.0
_BAD_STEPS = 10
_COMPILED_VARIANTS = 64


@dataclass(frozen=True)
class TrainOptions:
    """What the command line decides about a training.

    Attributes:
        minutes: until the training ends, whatever was done by then.
        batch_tokens: tokens of a step.
        micro_tokens: tokens that pass through the model together, at most.
        seq_len: tokens of a window.
        long_len: tokens of a window in the last part.
        long_share: of the training that has long windows.
        peak: highest learning rate.
        weight_decay: of matrices.
        eval_every: seconds between measurements of the held-out text.
        save_every: seconds between checkpoints.
        seed: of weights and windows.
        device: to train on.
        compile: whether torch.compile is used.
    """

    minutes: float
    batch_tokens: int
    micro_tokens: int
    seq_len: int
    long_len: int
    long_share: float
    peak: float
    weight_decay: float
    eval_every: float
    save_every: float
    seed: int
    device: str
    compile: bool


class Trainer:
    """Trains a model of `cfg` on prepared text."""

    def __init__(self, cfg: TinyConfig, data: Prepared, options: TrainOptions) -> None:
        self.started = time.monotonic()
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device(options.device)
        self.model = TinyNemotronH(cfg).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": options.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=options.peak,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.train_ids = torch.from_numpy(data.train.astype("int32")).to(self.device)
        self.heldout_ids = torch.from_numpy(data.heldout.astype("int32")).to(self.device)
        self.sampler = torch.Generator(self.device).manual_seed(options.seed)
        self.micro_tokens = options.micro_tokens
        self.step = self.tokens = self.left_out = 0
        self.peak = options.peak
        self.done = 0.0
        self.curve: list[dict[str, Any]] = []
        self._compiled = options.compile
        self.clock = Clock(0.0, 1.0)

    def run(self, checkpoint: Path) -> None:
        """Train until the minutes are over, from `checkpoint` on if there is one."""
        if checkpoint.exists():
            self.load(checkpoint)
            say(f"resumed at step {self.step}, {100 * self.done:.1f} % done")
        self.warm_up()
        left = 60 * self.options.minutes - (time.monotonic() - self.started)
        self.clock = Clock(self.done, left, time.monotonic)
        say(f"ready after {time.monotonic() - self.started:.0f} s; {left:.0f} s to train")
        begun = logged = evaluated = saved = time.monotonic()
        first_tokens, losses, bad = self.tokens, [], 0
        logged_tokens = self.tokens
        while (progress := self.clock.progress) < 1.0:
            loss = self.train_step(progress)
            bad = 0 if math.isfinite(loss) else bad + 1
            if bad >= _BAD_STEPS:
                self.take_back(checkpoint)
                bad = 0
            losses += [loss] if math.isfinite(loss) else []
            now = time.monotonic()
            if losses and now - logged >= _LOG_SECONDS:
                speed = (self.tokens - logged_tokens) / (now - logged)
                say(
                    f"{100 * progress:5.1f} %  step {self.step}  {self.tokens / 1e6:.1f} M tokens  "
                    f"loss {sum(losses) / len(losses):.4f}  {speed:,.0f} tokens/s  "
                    f"{self._memory()}"
                )
                logged, logged_tokens = now, self.tokens
                if now - evaluated >= self.options.eval_every:
                    self.evaluate(sum(losses) / len(losses))
                    evaluated = time.monotonic()
                losses = []
            if now - saved >= self.options.save_every:
                self.save(checkpoint)
                saved = time.monotonic()
        seconds = time.monotonic() - begun
        self.speed = (self.tokens - first_tokens) / seconds
        self.evaluate(sum(losses) / len(losses) if losses else None)
        self.save(checkpoint)

    def warm_up(self) -> None:
        """Compile every shape before the clock starts, and find the parts that fit into memory."""
        tokens = self.tokens
        if self._compiled:
            torch._dynamo.config.cache_size_limit = _COMPILED_VARIANTS
            for block in self.model.backbone.layers:
                block.compile(dynamic=False)
        for length in (self.options.long_len, self.options.seq_len):
            began = time.monotonic()
            try:
                self._accumulate(length)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if not self._compiled:
                    raise
                say(f"torch.compile failed, so the model runs as it is: {error}"[:2000])
                self._compiled = False
                torch._dynamo.reset()
                for block in self.model.backbone.layers:
                    block._compiled_call_impl = None
                self._accumulate(length)
            self.optimizer.zero_grad(set_to_none=True)
            say(f"windows of {length}: first step {time.monotonic() - began:.1f} s")
        self.heldout_loss()
        self.tokens = tokens
        self.sampler.manual_seed(self.options.seed + self.step)

    def train_step(self, progress: float) -> float:
        """One step; the mean loss of a token, or NaN where the step was left out."""
        rate = learning_rate(self.peak, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        is_long = progress >= 1 - self.options.long_share
        loss = self._accumulate(self.options.long_len if is_long else self.options.seq_len)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        good = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if good:
            self.optimizer.step()
        else:
            self.left_out += 1
            say(f"step {self.step}: gradient norm {norm.item()}, loss {loss.item()}: left out")
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.done = progress
        return loss.item() if good else math.nan

    def _accumulate(self, length: int) -> Tensor:
        """Gradients of one step; smaller parts where memory runs out."""
        while True:
            try:
                return self._accumulate_parts(length)
            except torch.OutOfMemoryError:
                if self.micro_tokens <= length:
                    raise
                self.micro_tokens //= 2
                say(f"out of memory: {self.micro_tokens} tokens together from now on")
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _accumulate_parts(self, length: int) -> Tensor:
        rows = max(1, self.micro_tokens // length)
        parts = max(1, self.options.batch_tokens // (rows * length))
        total = torch.zeros((), device=self.device)
        for _ in range(parts):
            ids = self._draw(rows, length)
            loss = self._loss(ids) / (parts * rows * length)
            loss.backward()
            total += loss.detach()
        self.tokens += parts * rows * length
        return total

    def _loss(self, ids: Tensor) -> Tensor:
        with self._autocast():
            hidden = self.model.backbone(ids[:, :-1])
            return summed_loss(hidden, self.model.lm_head.weight, ids[:, 1:].long())

    def _draw(self, rows: int, length: int) -> Tensor:
        """Windows at random places, int32 [rows, length + 1]."""
        span = torch.arange(length + 1, device=self.device)
        last = len(self.train_ids) - length
        starts = torch.randint(last, (rows, 1), generator=self.sampler, device=self.device)
        return self.train_ids[starts + span]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _memory(self) -> str:
        if self.device.type != "cuda":
            return ""
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"

    def heldout_loss(self) -> float:
        """Mean loss of a token of the held-out pages, in windows of the training's length.

        Gradients stay switched on: without them everything would be compiled once more.
        """
        length = self.options.seq_len
        rows = max(1, self.micro_tokens // length)
        span = torch.arange(length + 1, device=self.device)
        count = max(1, (len(self.heldout_ids) - 1) // length // rows)
        total = 0.0
        for part in range(min(count, 4)):
            # Windows go around at the end, so that every part has the same shape.
            starts = (part * rows + torch.arange(rows, device=self.device)) * length
            ids = self.heldout_ids[(starts[:, None] + span) % len(self.heldout_ids)]
            total += self._loss(ids).item() / (rows * length)
        return total / min(count, 4)

    def evaluate(self, train_loss: float | None) -> None:
        """Add a point to the curve."""
        loss = self.heldout_loss()
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "progress": round(self.done, 4),
            "learning_rate": float(f"{learning_rate(self.peak, self.done):.3g}"),
            "train_loss": None if train_loss is None else round(train_loss, 4),
            "heldout_loss": round(loss, 4),
            "heldout_perplexity": round(math.exp(min(loss, 50.0)), 3),
        }
        self.curve.append(point)
        say(f"held-out: {point}")

    def take_back(self, checkpoint: Path) -> None:
        """Return to the last checkpoint, or to the beginning, with half the learning rate."""
        step, done, tokens = self.step, self.done, self.tokens
        if checkpoint.exists():
            self.load(checkpoint)
        else:
            self.model.reset_parameters()
            self.optimizer.state.clear()
        self.step, self.done, self.tokens = step, done, tokens  # the clock does not go back
        self.peak /= 2
        say(f"{_BAD_STEPS} bad steps in a row: weights taken back, learning rate {self.peak:g}")

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.tokens, self.left_out, self.done, self.peak),
            "curve": self.curve,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.left_out, self.done, self.peak = state["progress"]
        self.curve = state["curve"]


def say(line: str) -> None:
    """Print at once: what is written after a time limit is lost."""
    print(line, flush=True)


def context_of(options: TrainOptions) -> int:
    """The longest text that the checkpoint's config.json promises."""
    return max(LONG_CONTEXT, options.long_len)
