# SPDX-License-Identifier: Apache-2.0
"""Pages that are made from something are what it makes of them now; the site needs no network."""

import ast
import json
import re
from pathlib import Path

import check_site
import docs_hooks
import docs_messages
import docs_pictures
import pytest
import torch
import yaml

from benchmarks.quality import table
from vllm_nanoquant.checkpoint.header import read_header
from vllm_nanoquant.cli.main import main
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.quantize.groups import QuantizedWeight, pack_nibbles
from vllm_nanoquant.recipe import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MESSAGES = (DOCS / "messages.md").read_text(encoding="utf-8")


def test_every_message_is_on_its_page():
    assert docs_messages.page() == MESSAGES, "run: python tools/docs_messages.py docs/messages.md"


def fragments(node):
    """Pieces of text below a node."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield " ".join(part.value.split())


def test_no_raise_and_no_warning_is_missed():
    """By fragments, so in another way than the page is made."""
    missed, counted = [], 0
    for path in (ROOT / "vllm_nanoquant").rglob("*.py"):
        if "doctor" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_warning = isinstance(node, ast.Call) and "warning" in ast.unparse(node.func)
            what = node.exc if isinstance(node, ast.Raise) else node if is_warning else None
            longest = max(fragments(what), key=len, default="") if what else ""
            if len(longest.split()) < 3:
                continue
            counted += 1
            if re.sub(r"%[sdr]", "…", longest) not in MESSAGES:
                missed.append((path.name, longest))
    assert missed == []
    assert counted > 200


def templates():
    return [
        re.compile(".*".join(re.escape(part) for part in line.split("…")), re.DOTALL)
        for line in re.findall(r"^- `+ ?(.*?) ?`+$", MESSAGES, re.MULTILINE)
    ]


def cut(path):
    path.write_bytes(b"\x10" + bytes(7) + b"{}")
    read_header(path)


@pytest.mark.parametrize(
    "fail",
    [
        lambda folder: Recipe.parse({"grup_size": 64}),
        lambda folder: Recipe.parse({"ignore": ["re:("]}),
        lambda folder: Recipe(ignore=("x",)).check_against(["model.layers.0.mlp.up_proj"]),
        lambda folder: Recipe(preset="quality").scheme("model.layers.0.mlp.up_proj", None),
        lambda folder: pack_nibbles(torch.ones(2, 2)),
        lambda folder: cut(folder / "x.safetensors"),
    ],
)
def test_a_real_message_is_found(fail, tmp_path):
    with pytest.raises(ValueError) as caught:
        fail(tmp_path)
    text = " ".join(str(caught.value).split())
    assert any(template.search(text) for template in templates()), text


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "nowhere/at-all", "x"], ["verify", "nowhere"], ["inspect", "nowhere"]],
)
def test_what_the_command_line_says_is_found(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) != 0
    text = " ".join(capsys.readouterr().err.removeprefix("nanoquant: error: ").split())
    assert any(template.search(text) for template in templates()), text


def test_the_pictures_are_what_their_script_draws():
    for name, draw in docs_pictures.PICTURES.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == draw(), name
        assert f"images/{name}" in (DOCS / "kernels.md").read_text(encoding="utf-8")


def test_the_picture_of_the_layout_is_the_layout():
    # Each weight alone is 15, and everything else 0: where does it go?
    for row, column in [(0, 0), (2, 8), (10, 47), (15, 127), (7, 64), (8, 33), (5, 101)]:
        q = torch.zeros((16, 128), dtype=torch.uint8)
        q[row, column] = 15
        one = torch.ones((1, 16), dtype=torch.bfloat16)
        weight = RuntimeWeight.from_quantized(QuantizedWeight(pack_nibbles(q), one, one, 128, 128))
        (word,) = weight.words[0, 0, 0].nonzero().flatten().tolist()
        bits = int(weight.words[0, 0, 0, word]) & 0xFFFFFFFF
        lane, expected, bit = docs_pictures.place(row, column)
        assert (word, bits) == (expected, 15 << bit)
        assert lane == word % 128 // 4


def test_the_tables_of_quality_are_those_of_the_results():
    page = (DOCS / "quality.md").read_text(encoding="utf-8")
    for rows, source in (
        (table.quality_rows, table.QUALITY),
        (table.comparison_rows, table.QUALITY),
        (table.served_rows, table.SERVED),
    ):
        text = "\n".join(rows(json.loads(source.read_text())))
        assert text.count("\n") > 5 and text in page, "run: python benchmarks/quality/table.py"


def nav_pages(entry):
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in nav_pages(value)]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = nav_pages(yaml.safe_load(text)["nav"])
    generated = {docs_hooks.PAGES[source] for source in docs_hooks.GENERATED}
    assert len(pages) == len(set(pages))
    assert set(pages) == {path.name for path in DOCS.glob("*.md")} | generated


def test_links_of_the_roots_pages_are_moved():
    moved = docs_hooks.moved
    assert moved("[a](docs/errors.md#x) [b](https://x.y/docs/z)") == (
        "[a](errors.md#x) [b](https://x.y/docs/z)"
    )
    assert moved("[a](CHANGELOG.md) [b](#style)") == "[a](changelog.md) [b](#style)"
    assert moved("see [a](LICENSE), [b](README.md#use)") == "see a, [b](index.md#use)"
    with pytest.raises(ValueError, match="there is no nowhere/x in the repository"):
        moved("[a](nowhere/x)")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.html", '<script src="https://unpkg.com/x"></script>', "a.html: fetches https://unpkg"),
        ("a.html", '<img src="//elsewhere/x.png">', "a.html: fetches //elsewhere/x.png"),
        ("a.html", '<link rel="stylesheet" href="http://x/y.css">', "fetches http://x/y.css"),
        ("a.html", '<img src="images/none.svg">', "images/none.svg is not in the site"),
        ("a.css", "b { background: url( 'https://x/y.png' ) }", "a.css: fetches url("),
        ("a.css", '@import "//fonts.x/y";', "a.css: fetches @import"),
    ],
)
def test_a_site_that_needs_a_network_is_found_out(name, text, problem, tmp_path, capsys):
    fine = '<a href="https://x.y">x</a><img src="data:image/png;base64,AA">'
    fine += '<link rel="next" href="//x">'
    (tmp_path / "index.html").write_text(fine)
    assert check_site.main([str(tmp_path)]) == 0
    (tmp_path / name).write_text(text)
    assert check_site.main([str(tmp_path)]) == 1
    assert problem in capsys.readouterr().out
