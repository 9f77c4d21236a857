"""The training loop: resumable, bounded in steps or in time, keeps the best averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tiny_model.model import TinyConfig, TinyNemotronH
from tiny_model.tokens import PreparedData, generate, window_nll

PROMPTS = ("It was a truth universally acknowledged that", "Elizabeth was")


@dataclass(frozen=True)
class TrainOptions:
    """What the command line decides about a training run."""

    steps: int
    time_limit: float
    batch_size: int
    seq_len: int
    learning_rate: float
    weight_decay: float
    dropout: float
    warmup: int
    ema_decay: float
    eval_every: int
    save_every: float
    seed: int
    device: str
    compile: bool


class Trainer:
    """Trains a ``TinyNemotronH`` and remembers its best averaged weights.

    Validation loss, samples and the final weights all come from an exponential moving average of
    the weights, which is less noisy than the weights themselves.
    """

    def __init__(self, cfg: TinyConfig, data: PreparedData, options: TrainOptions) -> None:
        torch.manual_seed(options.seed)
        self.data = data
        self.options = options
        self.device = torch.device(options.device)
        self.model = TinyNemotronH(cfg, options.dropout).to(self.device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.model, options)
        self.train_ids = data.train.to(self.device)
        self.validation_ids = data.validation.to(self.device)
        self.sampler = torch.Generator(self.device).manual_seed(options.seed)
        self.step = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.curve: list[dict[str, float]] = []
        self._loss_of = self._batch_loss
        if options.compile:
            self._loss_of = torch.compile(self._batch_loss, dynamic=False)

    def run(self, checkpoint: Path, report: Callable[[str], None] = tqdm.write) -> None:
        """Train until the steps or the seconds run out, from ``checkpoint`` on if it exists.

        Afterwards ``best_weights`` holds the weights with the lowest validation loss.
        """
        if checkpoint.exists():
            self._load(checkpoint)
            report(f"resumed at step {self.step}")
        options = self.options
        self._warm_up()
        begun, saved, losses = time.monotonic() - self.seconds, self.seconds, []
        with tqdm(total=options.steps, initial=self.step, unit="step", mininterval=5) as bar:
            while self.step < options.steps and self.seconds < options.time_limit:
                losses.append(self._train_step())
                self.seconds = time.monotonic() - begun
                bar.update()
                last = self.step == options.steps or self.seconds >= options.time_limit
                if last or self.step % options.eval_every == 0:
                    self._evaluate(torch.stack(losses).mean().item(), report)
                    losses = []
                if last or self.seconds - saved >= options.save_every:
                    self._save(checkpoint)
                    saved = self.seconds

    def _warm_up(self) -> None:
        """Compile before the clock starts, so that the time limit is for training alone."""
        window = self.train_ids[: self.options.seq_len + 1]
        self._loss_of(window.repeat(self.options.batch_size, 1)).backward()
        self.optimizer.zero_grad()

    def progress(self) -> float:
        """How much of the budget, of steps or of time, is spent: 0 to 1."""
        options = self.options
        return min(1.0, max(self.step / options.steps, self.seconds / options.time_limit))

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        options = self.options
        rise = min(1.0, (self.step + 1) / options.warmup)
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress()))
        return options.learning_rate * rise * fall

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _batch_loss(self, ids: Tensor) -> Tensor:
        with self._autocast():
            logits = self.model(ids[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def _draw_batch(self) -> Tensor:
        """Windows at random offsets, (batch, seq_len + 1)."""
        options = self.options
        span = torch.arange(options.seq_len + 1, device=self.device)
        starts = torch.randint(
            len(self.train_ids) - options.seq_len,
            (options.batch_size, 1),
            generator=self.sampler,
            device=self.device,
        )
        return self.train_ids[starts + span]

    def _train_step(self) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self._loss_of(self._draw_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # A young average forgets faster, or it would drag the random start along.
        decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - decay
            )
        return loss.detach()

    def _evaluate(self, train_loss: float, report: Callable[[str], None]) -> None:
        with self._autocast():
            losses = window_nll(self.average, self.validation_ids, self.options.seq_len)
        validation_loss = losses.nanmean().item()
        entry = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "learning_rate": float(f"{self.learning_rate():.3g}"),
            "train_loss": round(train_loss, 4),
            "validation_loss": round(validation_loss, 4),
        }
        self.curve.append(entry)
        report(str(entry))
        if validation_loss < self.best_loss:
            self.best_loss = validation_loss
            self.best_weights = {k: v.cpu().clone() for k, v in self.average.state_dict().items()}
        if len(self.curve) % 10 == 0:
            for prompt in PROMPTS:
                report(f"  {prompt}|{generate(self.average, self.data.tokenizer, prompt, 40)}")

    def _save(self, path: Path) -> None:
        state = {
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.get_state(),
            "progress": (self.step, self.seconds, self.best_loss),
            "best_weights": self.best_weights,
            "curve": self.curve,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)  # a killed run leaves the old checkpoint or the new, never half

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.set_state(state["sampler"].cpu())
        self.step, self.seconds, self.best_loss = state["progress"]
        self.best_weights = {k: v.cpu() for k, v in state["best_weights"].items()}
        self.curve = state["curve"]


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW that decays the matrices only: no norms, biases, convolutions, scan parameters."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = options.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=fused)
