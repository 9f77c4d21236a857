# SPDX-License-Identifier: Apache-2.0
"""The prepared text: a tokenizer and token streams in a folder that can be carried anywhere.

tokenizer.json   byte-level BPE, trained on the training text alone
train.xz         training tokens, uint16, documents between bos and eos, in the order of packages
heldout.xz       the same for pages that training never sees
long.xz          documents longer than LONG_CONTEXT tokens, cut to that, none of them in training
heldout.txt      text of some of the held-out pages, to ship with a checkpoint
about.json       packages, counts, and what was held out
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model.tokens import BOS, EOS, train_tokenizer
from tokenizers import Tokenizer

from small_model.corpus import Document

LONG_CONTEXT = 16384
"""Tokens of each long held-out document."""
_HELD_OUT_ONE_IN = 150
_LONG_DOCUMENTS = 32
_LONG_PER_PACKAGE = 3
_LONG_CHARACTERS = 50_000  # less cannot have that many tokens
_TOKENIZER_CHARACTERS = 60_000_000
_SHIPPED_CHARACTERS = 60_000
_BATCH = 512
# A page that training has in another format, or nearly: so many runs of words are there, too.
_RUN_WORDS = 8
_MOST_SHARED = 0.1


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote.

    Attributes:
        tokenizer: of the model.
        train: uint16 [tokens].
        heldout: uint16 [tokens].
        long: uint16 [documents, LONG_CONTEXT].
        about: packages and counts.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    heldout: np.ndarray
    long: np.ndarray
    about: dict[str, Any]


def prepare(found: Iterable[Document], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Split the documents, train the tokenizer, and write the folder; what it came to.

    Raises:
        ValueError: the text is too small for a vocabulary of that size, or has no long document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout, long = _split(list(found))
    sample = _spread(train, _TOKENIZER_CHARACTERS)
    tokenizer = train_tokenizer([document.text for document in sample], vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    tokenizer.save(str(folder / "tokenizer.json"))
    streams = {"train": _encode(tokenizer, train)}
    cut = [_encode(tokenizer, [document])[:LONG_CONTEXT] for document in long]
    kept = [i for i, ids in enumerate(cut) if len(ids) == LONG_CONTEXT][:_LONG_DOCUMENTS]
    if not kept:
        raise ValueError(f"no held-out document has {LONG_CONTEXT} tokens")
    long, cut = [long[i] for i in kept], [cut[i] for i in kept]
    beginnings = [tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) for ids in cut]
    shared = shared_runs([*(document.text for document in heldout), *beginnings], train)
    clean = [share <= _MOST_SHARED for share in shared]
    heldout = [document for document, fine in zip(heldout, clean, strict=False) if fine]
    kept = [i for i, fine in enumerate(clean[-len(long) :]) if fine]
    if not heldout or not kept:
        raise ValueError("training has all that is held out in other words: give other text")
    streams["heldout"] = _encode(tokenizer, heldout)
    streams["long"] = np.concatenate([cut[i] for i in kept])
    for name, ids in streams.items():
        (folder / f"{name}.xz").write_bytes(lzma.compress(ids.tobytes(), preset=9))
    text = "\n\n".join(document.text for document in heldout)
    (folder / "heldout.txt").write_text(text[:_SHIPPED_CHARACTERS] + "\n", encoding="utf-8")
    about = {
        "vocabulary": vocab_size,
        "tokens": {name: len(ids) for name, ids in streams.items()},
        "characters": sum(len(document.text) for document in train),
        "documents": {"train": len(train), "heldout": len(heldout), "long": len(kept)},
        "long": [long[i].source for i in kept],
        "characters_by_package": dict(_by_package(train)),
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def load(folder: Path) -> Prepared:
    """Read what `prepare` wrote."""

    def stream(name: str) -> np.ndarray:
        return np.frombuffer(lzma.decompress((folder / f"{name}.xz").read_bytes()), np.uint16)

    return Prepared(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        stream("train"),
        stream("heldout"),
        stream("long").reshape(-1, LONG_CONTEXT),
        json.loads((folder / "about.json").read_text(encoding="utf-8")),
    )


def shared_runs(texts: list[str], train: Iterable[Document]) -> list[float]:
    """How much of each text training has word for word: share of its runs of 8 words, 0 to 1."""
    runs = [_runs(text) for text in texts]
    wanted = set().union(*runs)
    seen: set[int] = set()
    for document in train:
        seen |= wanted & _runs(document.text)
    return [len(of_text & seen) / max(1, len(of_text)) for of_text in runs]


def _runs(text: str) -> set[int]:
    words = text.split()
    columns = (words[start : len(words) - _RUN_WORDS + 1 + start] for start in range(_RUN_WORDS))
    return set(map(hash, zip(*columns, strict=True))) if len(words) >= _RUN_WORDS else set()


def _split(found: list[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """Training, held-out and long held-out documents, by a digest of where they come from."""
    by_digest = sorted(found, key=_digest)
    long: list[Document] = []
    per_package: Counter[str] = Counter()
    for document in by_digest:
        package = document.source.partition(":")[0]
        wanted = len(long) < 2 * _LONG_DOCUMENTS and per_package[package] < _LONG_PER_PACKAGE
        if wanted and len(document.text) >= _LONG_CHARACTERS:
            per_package[package] += 1
            long.append(document)
    taken = {document.source for document in long}
    rest = [document for document in found if document.source not in taken]
    count = max(1, len(rest) // _HELD_OUT_ONE_IN)
    held = {document.source for document in sorted(rest, key=_digest)[:count]}
    heldout = [document for document in rest if document.source in held]
    train = [document for document in rest if document.source not in held]
    return train, heldout, long


def _digest(document: Document) -> str:
    return hashlib.sha256(document.source.encode()).hexdigest()


def _spread(found: list[Document], characters: int) -> list[Document]:
    """Evenly spread documents of about so many characters together."""
    total = sum(len(document.text) for document in found)
    return found[:: max(1, round(total / characters))]


def _encode(tokenizer: Tokenizer, found: list[Document]) -> np.ndarray:
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    parts = []
    for start in range(0, len(found), _BATCH):
        batch = [document.text for document in found[start : start + _BATCH]]
        for encoding in tokenizer.encode_batch(batch):
            parts.append(np.array([bos, *encoding.ids, eos], dtype=np.uint16))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def _by_package(found: list[Document]) -> list[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for document in found:
        counts[document.source.partition(":")[0]] += len(document.text)
    return counts.most_common()
