# SPDX-License-Identifier: Apache-2.0
"""Training of the small model: text, data, schedule, and what can go wrong unattended."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import corpus, data, trainer
from small_model.clock import Clock, learning_rate
from small_model.corpus import Document, documents, page_text
from small_model.geometry import GEOMETRIES, MINIATURE, SMALL
from small_model.loss import summed_loss
from small_model.trainer import Trainer, TrainOptions
from tiny_model.export import export, load_exported, model_config
from tiny_model.model import TinyNemotronH

PROSE = (
    "The purpose of the system is to keep the state of a file that is in use, and it is written "
    "with the other files of the same folder for as long as they are there."
)


def package(folder: Path, name: str, pages: dict[str, str]) -> Path:
    """A Debian package with some pages in it, as dpkg-deb reads it."""
    root = folder / name
    for path, text in pages.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\n"
    (root / "DEBIAN/control").write_text(control + "Description: text\n", encoding="utf-8")
    target = folder / f"{name}_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(root), str(target)],
        check=True,
        capture_output=True,
    )
    return target


def long_prose(word: str) -> str:
    return "\n\n".join(f"{word} {i}: {PROSE}" for i in range(8))


def test_pages_lose_tags_and_navigation_and_keep_paragraphs() -> None:
    text = page_text(
        "<head><title>no</title></head><nav>Up</nav><h1>A&amp;B</h1><p>one <b>two</b>"
        "<script>x()</script></p><!-- gone --><p>three\u00b6</p><pre>a\n  b</pre>"
    )
    assert text == "A&B\n\none two \n\nthree\n\na\n  b".replace("two \n", "two\n")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_documents_are_english_prose_once(tmp_path: Path) -> None:
    shared = long_prose("Both")
    first = package(
        tmp_path,
        "first",
        {
            "usr/share/doc/first/a.txt": long_prose("One"),
            "usr/share/doc/first/b.html": f"<p>{shared.replace(chr(10) * 2, '</p><p>')}</p>",
            "usr/share/doc/first/de/c.txt": long_prose("Drei"),
            "usr/share/doc/first/table.txt": "0x10 0x20 EAX RBX\n\n" * 200,
            "usr/share/doc/first/code.py": long_prose("Code"),
            "usr/share/doc/first/changelog.txt": long_prose("Change"),
        },
    )
    second = package(
        tmp_path, "second", {"usr/share/doc/second/d.txt": shared + "\n\n" + long_prose("Two")}
    )
    found = {document.source: document.text for document in documents([first, second])}
    assert list(found) == [
        "first:/usr/share/doc/first/a.txt",
        "first:/usr/share/doc/first/b.html",
        "second:/usr/share/doc/second/d.txt",
    ]
    assert found["second:/usr/share/doc/second/d.txt"] == long_prose("Two")


def test_packages_are_checked_against_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"package": "a", "version": "1", "file": "a_1_all.deb", "sha256": "0" * 64}
    names = tmp_path / "packages.json"
    names.write_text(json.dumps([entry]), encoding="utf-8")
    (tmp_path / "a_1_all.deb").write_bytes(b"other bytes")
    monkeypatch.setattr(corpus, "PACKAGES", names)
    with pytest.raises(RuntimeError, match="SHA-256"):
        corpus.fetch_packages(tmp_path)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as prepare_small_corpus.py writes it, of 40 short documents and two long ones."""
    monkeypatch.setattr(data, "LONG_CONTEXT", 256)
    monkeypatch.setattr(data, "_LONG_CHARACTERS", 5000)
    words = [
        "water",
        "river",
        "stone",
        "bridge",
        "garden",
        "winter",
        "letter",
        "window",
        "silver",
        "morning",
    ]
    found = [
        Document(f"p{i % 4}:/{i}", " ".join(f"{words[(i * j) % 10]} {i * j}" for j in range(60)))
        for i in range(40)
    ]
    found += [Document(f"p{i}:/long", f"{words[i]} " * 1500) for i in range(2)]
    data.prepare(found, 300, tmp_path / "data")
    return tmp_path / "data"


def test_prepared_text_comes_back_and_nothing_held_out_is_trained_on(prepared: Path) -> None:
    read = data.load(prepared)
    assert read.train.dtype == read.long.dtype == np.uint16
    assert read.long.shape[1] == 256
    assert len(read.train) == read.about["tokens"]["train"]
    assert int(read.train.max()) < 300
    held = read.tokenizer.decode(read.heldout.tolist())
    assert (prepared / "heldout.txt").read_text("utf-8").strip()[:100] in held
    train = read.tokenizer.decode(read.train.tolist())
    assert held[:60] not in train
    assert read.about["documents"] == {"train": 39, "heldout": 1, "long": 2}


def test_prepare_refuses_text_without_a_long_document(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"long|tokens"):
        data.prepare([Document("a:/b", "abc " * 300)] * 3, 260, tmp_path)


def test_schedule_follows_the_clock_and_ends_decayed() -> None:
    now = 100.0
    clock = Clock(0.25, 50.0, lambda: now)
    assert clock.progress == 0.25
    now = 125.0
    assert clock.progress == pytest.approx(0.625)
    now = 1000.0
    assert clock.progress == 1.0
    assert Clock(0.5, -3.0).progress == 1.0
    rates = [learning_rate(2.0, step / 1000) for step in range(1001)]
    assert max(rates) == 2.0
    assert rates[0] < 0.05
    assert rates[-1] == pytest.approx(0.002)
    top = rates.index(2.0)
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


def test_loss_in_parts_is_the_whole_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("small_model.loss.CHUNK_TOKENS", 7)
    hidden, head = torch.randn(3, 9, 8), torch.randn(20, 8)
    wanted = torch.randint(20, (3, 9))
    logits = (hidden @ head.t()).log_softmax(-1)
    expected = -logits.gather(2, wanted[..., None]).sum()
    torch.testing.assert_close(summed_loss(hidden, head, wanted), expected)


def options(**changes: object) -> TrainOptions:
    plain = TrainOptions(
        minutes=0.05,
        batch_tokens=256,
        micro_tokens=128,
        seq_len=32,
        long_len=64,
        long_share=0.2,
        peak=1e-3,
        weight_decay=0.1,
        eval_every=1.0,
        save_every=1.0,
        seed=0,
        device="cpu",
        compile=False,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def make(prepared: Path, **changes: object) -> Trainer:
    return Trainer(MINIATURE, data.load(prepared), options(**changes))


class Ticking:
    """A clock that goes on by itself, however slow the machine is."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 0.1
        return self.seconds


def test_training_learns_saves_and_is_resumed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "time", Ticking())
    checkpoint = tmp_path / "work" / "checkpoint.pt"
    first = make(prepared, minutes=0.08)
    before = first.heldout_loss()
    first.run(checkpoint)
    assert first.curve[-1]["heldout_loss"] < before
    assert first.tokens == first.step * 256
    state = torch.load(checkpoint, weights_only=True)
    state["progress"] = (*state["progress"][:3], 0.5, 1e-3)  # as if it had been killed half way
    torch.save(state, checkpoint)
    second = make(prepared, minutes=0.05)
    second.run(checkpoint)
    assert second.step > first.step
    assert second.done > 0.5
    assert not list(checkpoint.parent.glob("*.partial"))


def test_steps_without_a_finite_gradient_are_left_out(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(prepared)
    weights = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    loss = one._loss
    monkeypatch.setattr(one, "_loss", lambda ids: loss(ids) * math.nan)
    assert math.isnan(one.train_step(0.5))
    assert one.left_out == 1
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    one.save(tmp_path / "c.pt")
    with torch.no_grad():
        next(one.model.parameters()).fill_(math.nan)
    one.take_back(tmp_path / "c.pt")
    assert torch.equal(next(one.model.parameters()), next(iter(weights.values())))
    assert one.peak == 5e-4


def test_memory_running_out_makes_parts_smaller(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(prepared)
    loss = one._loss

    def fits_two_rows(ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("too much")
        return loss(ids)

    monkeypatch.setattr(one, "_loss", fits_two_rows)
    assert math.isfinite(one.train_step(0.5))
    assert one.micro_tokens == 64
    monkeypatch.setattr(one, "_loss", lambda ids: fits_two_rows(ids.repeat(9, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        one.train_step(0.5)


def test_a_failing_compiler_costs_speed_only(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    one = make(prepared, compile=True)
    for block in one.model.backbone.layers:
        monkeypatch.setattr(
            block, "compile", lambda block=block, **_: setattr(block, "_compiled_call_impl", broken)
        )
    one.warm_up()
    assert "no compiler" in capsys.readouterr().out
    assert math.isfinite(one.train_step(0.5))
    assert one.tokens == 256


def test_geometries_have_the_shapes_that_the_9b_has() -> None:
    nine = json.loads(
        (
            Path(__file__).parents[2] / "benchmarks/geometry/nemotron-nano-9b-v2/config.json"
        ).read_text("utf-8")
    )
    small = model_config(SMALL, trainer.context_of(options()))
    assert small.keys() - nine.keys() <= {"expand"}
    assert nine["hybrid_override_pattern"].startswith(SMALL.pattern[:23])
    ratio = SMALL.intermediate_size / SMALL.hidden_size
    assert ratio == nine["intermediate_size"] / nine["hidden_size"]
    assert SMALL.intermediate_size % 128 == nine["intermediate_size"] % 128 == 64
    assert small["max_position_embeddings"] == 16384
    parameters = sum(p.numel() for p in TinyNemotronH(SMALL).parameters())
    assert 50e6 < parameters < 150e6
    assert set(GEOMETRIES) == {"small", "miniature"}


def test_exported_checkpoint_is_the_model_in_bf16(prepared: Path, tmp_path: Path) -> None:
    model = TinyNemotronH(MINIATURE)
    export(model.state_dict(), MINIATURE, prepared, tmp_path / "out", 512)
    again = load_exported(tmp_path / "out", MINIATURE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.bfloat16).float())
    tokens = json.loads((tmp_path / "out/tokenizer_config.json").read_text("utf-8"))
    assert tokens["model_max_length"] == 512
