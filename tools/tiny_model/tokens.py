"""The tokenizer, and the token streams that training reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tiny_model.text import Corpus

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = [PAD, BOS, EOS]  # in the order of their ids

# A base model has no roles: the messages are joined, and the model writes on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class PreparedData:
    """What the training loop and the evaluation need, on the CPU.

    Attributes:
        train: token stream of all training chapters, each between bos and eos, (tokens,).
        validation: the same for the validation chapters.
        heldout: the text that is shipped and measured, never trained on.
    """

    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor
    heldout: str


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every byte has a token, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(corpus: Corpus, vocab_size: int, folder: Path) -> None:
    """Train the tokenizer on ``corpus.train`` and write the prepared data into ``folder``.

    Raises:
        ValueError: if the text is too small for a vocabulary of that size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "heldout.txt").write_text("\n\n".join(corpus.heldout) + "\n", encoding="utf-8")
    parts = {"train": corpus.train, "validation": corpus.validation}
    (folder / "chapters.json").write_text(json.dumps(parts), encoding="utf-8")


def load_prepared(folder: Path) -> PreparedData:
    """Read what ``prepare`` wrote."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chapters = json.loads((folder / "chapters.json").read_text(encoding="utf-8"))
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)

    def stream(texts: list[str]) -> Tensor:
        ids = [[bos, *encoding.ids, eos] for encoding in tokenizer.encode_batch(texts)]
        return torch.tensor([i for chapter in ids for i in chapter], dtype=torch.long)

    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")
    return PreparedData(
        tokenizer, stream(chapters["train"]), stream(chapters["validation"]), heldout
    )


@torch.no_grad()
def window_nll(model: torch.nn.Module, ids: Tensor, window: int, batch: int = 16) -> Tensor:
    """Negative log-likelihoods over non-overlapping windows, each read from an empty state.

    Args:
        model: maps ids (batch, time) to logits (batch, time, vocab).
        ids: token stream, (tokens,), on the model's device.
        window: tokens in a window. The first of each is context only and is not scored.
        batch: windows in one forward pass.

    Returns:
        (tokens,) natural-log losses in fp32, NaN where a token is not scored.
    """
    full = len(ids) // window
    losses = torch.full((len(ids),), math.nan, device=ids.device)
    groups = [*ids[: full * window].view(full, window).split(batch), ids[None, full * window :]]
    offset = 0
    for group in groups:
        if group.shape[1] > 1:
            logits = model(group[:, :-1]).float()
            scored = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), group[:, 1:].flatten(), reduction="none"
            )
            part = losses[offset : offset + group.numel()].view(group.shape)
            part[:, 1:] = scored.view(group.shape[0], -1)
        offset += group.numel()
    return losses


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """Return how many bytes of text each token stands for, (vocab,); special tokens have none."""
    size = tokenizer.get_vocab_size()
    # Byte-level BPE writes every byte as one printable character.
    lengths = [len(tokenizer.id_to_token(i)) for i in range(size)]
    for special in SPECIAL_TOKENS:
        lengths[tokenizer.token_to_id(special)] = 0
    return torch.tensor(lengths)


def perplexity(losses: Tensor, ids: Tensor, tokenizer: Tokenizer) -> dict[str, float]:
    """Sum up ``window_nll`` of ``ids``: per-token loss and perplexity, bits per byte, counts."""
    scored = ~losses.isnan()
    total = losses[scored].double().sum().item()
    tokens = int(scored.sum())
    scored_bytes = int(byte_lengths(tokenizer)[ids[scored].cpu()].sum())
    return {
        "tokens_scored": tokens,
        "bytes_scored": scored_bytes,
        "nll_per_token": total / tokens,
        "perplexity_per_token": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / scored_bytes,
    }


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continue ``prompt`` by up to ``length`` tokens; temperature 0 is greedy.

    Recomputes the whole text for every token, which is fast enough for a few samples.
    """
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    random = torch.Generator().manual_seed(seed)
    for _ in range(length):
        logits = model(torch.tensor([ids], device=device))[0, -1].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            chances = (logits / temperature).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=random))
        if token == tokenizer.token_to_id(EOS):
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])
