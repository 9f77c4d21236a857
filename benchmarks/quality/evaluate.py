# SPDX-License-Identifier: Apache-2.0
"""How good the weights of checkpoints are, as a model predicts text with them.

    python benchmarks/quality/evaluate.py models/tiny-nemotron-h CHECKPOINT...

Each checkpoint (stock, ours, or one of another tool that `nanoquant convert` reads) is dequantized
to fp32, and the model is run in fp32 by transformers, its Mamba layers with steps of any size as in
vLLM, on the stock checkpoint's heldout.txt in non-overlapping windows, so that weights are compared
and nothing else. Figures:

    perplexity      exp of the mean negative log likelihood of a token
    KL divergence   of the next-token distribution from the stock model's, nats for each token
    agreement       positions at which both find the same token the likeliest
    relative error  ||W' - W|| / ||W|| over all quantized weights
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from benchmarks.quality.metrics import Scores, paired_difference  # noqa: E402
from benchmarks.quality.weights import DenseWeights, read_weights  # noqa: E402
from tests.serving.engines import heldout_windows  # noqa: E402
from vllm_nanoquant.calibration.skeleton import lift_step_limits  # noqa: E402

BATCH = 4
"""Windows that are run together."""
SCAN_CHUNK = 16
"""Tokens that Mamba layers in plain PyTorch take at a time: the time and memory of the scan grow
with it, and of the result only the order of its sums depends on it."""


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint came to.

    Attributes:
        scores: window by window.
        figures: for the result file.
    """

    scores: Scores
    figures: dict[str, Any]


class Evaluator:
    """The stock model's predictions, and others' beside them."""

    def __init__(self, stock: Path, window: int = 512) -> None:
        """Run the stock model.

        Args:
            stock: folder of the stock checkpoint, with tokenizer.json and heldout.txt.
            window: tokens in a window.
        """
        self._stock_folder = stock
        self._stock = read_weights(stock)
        ids = heldout_windows(stock, window, sys.maxsize)
        self._windows = [torch.tensor(part) for part in ids]
        self._reference = list(self._logits(self._stock))
        self.stock = self._evaluate(self._stock, self._reference)

    def evaluate(self, folder: Path) -> Evaluation:
        """Run the model with the weights of a checkpoint of it."""
        weights = read_weights(folder)
        return self._evaluate(weights, self._logits(weights))

    def _evaluate(self, weights: DenseWeights, logits: Any) -> Evaluation:
        scores = Scores()
        for rows, reference, window in zip(logits, self._reference, self._windows, strict=True):
            scores.add(rows, reference, window)
        figures: dict[str, Any] = {
            "perplexity": scores.perplexity,
            "kl_divergence": scores.mean_divergence,
            "agreement": scores.agreement,
            "tokens": sum(scores.tokens),
            "quantized_modules": len(weights.quantized),
            "relative_error": weights.relative_error(self._stock),
            "bits_per_quantized_weight": weights.bits_per_weight,
            "bytes": weights.bytes_all,
        }
        if hasattr(self, "stock"):
            stock = self.stock.scores
            loss, error = paired_difference(scores.loss_by_window, stock.loss_by_window)
            figures |= {"loss_over_stock": loss, "loss_over_stock_error": error}
        return Evaluation(scores, figures)

    @torch.inference_mode()
    def _logits(self, weights: DenseWeights) -> Iterator[torch.Tensor]:
        """Logits [T, vocabulary] of each window, fp32."""
        model = dense_model(self._stock_folder, weights)
        for start in range(0, len(self._windows), BATCH):
            batch = torch.stack(self._windows[start : start + BATCH])
            yield from model(batch).logits


def write_config(stock: Path, folder: Path) -> None:
    """Write a checkpoint's config.json to another folder, with a quicker scan: `SCAN_CHUNK`."""
    config = json.loads((stock / "config.json").read_text(encoding="utf-8"))
    if "chunk_size" in config:
        config["chunk_size"] = SCAN_CHUNK
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def dense_model(stock: Path, weights: DenseWeights) -> Any:
    """The transformers model of a stock checkpoint, with other weights, in fp32.

    Raises:
        ValueError: tensors are missing, or too many.
    """
    # Not at the top: it is slow to import.
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(stock, folder)
        contiguous = {key: tensor.contiguous() for key, tensor in weights.tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    wrong = {key: sorted(names) for key, names in loading.items() if names}
    if wrong:
        raise ValueError(f"the checkpoint does not fit the model: {wrong}")
    lift_step_limits(model)
    return model.eval()


def in_words(name: str, figures: dict[str, Any]) -> str:
    """One line for people."""
    error, bits = figures["relative_error"], figures["bits_per_quantized_weight"]
    weights = f"  weights off by {error:.4f} in {bits:.2f} bits" if bits else ""
    return (
        f"{name:26} perplexity {figures['perplexity']:8.3f}  KL {figures['kl_divergence']:.3e}  "
        f"agreement {figures['agreement']:.4f}{weights}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stock", type=Path, help="folder of the stock checkpoint")
    parser.add_argument("checkpoints", type=Path, nargs="*", help="folders to compare with it")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    evaluator = Evaluator(arguments.stock, arguments.window)
    results = {"stock": evaluator.stock.figures}
    for folder in arguments.checkpoints:
        results[str(folder)] = evaluator.evaluate(folder).figures
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        print("\n".join(in_words(name, figures) for name, figures in results.items()))


if __name__ == "__main__":
    main()
