# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/kernels.md.

    python tools/docs_pictures.py docs/images

Plain SVG with a background of its own, so that they can be read on light and dark pages alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COLOURS = ("#bcd4f2", "#f6d9a8", "#c9e6c0", "#ecc6d8", "#d5cdf0", "#f3e3a0")
STRONG = "#1f4e8c"
GREY = "#e3e5e8"
INK = "#1b1f24"
WIDTH = 720

COLUMNS = 128
ROWS = 16


class Picture:
    """An SVG that grows by shapes; coordinates are pixels from the upper left corner."""

    def __init__(self, height: int, title: str) -> None:
        self._parts: list[str] = []
        self._height = height
        self._title = title

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str = "none") -> None:
        """Draw a rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        size: int = 14,
        bold: bool = False,
    ) -> None:
        """Write a line of text whose baseline is at y."""
        weight = ' font-weight="bold"' if bold else ""
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight} '
            f'fill="{INK}">{escaped}</text>'
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draw a line with a head at its end."""
        self._parts.append(
            f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" stroke="{INK}" stroke-width="1.5" '
            'marker-end="url(#head)"/>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float = 1) -> None:
        """Draw a line."""
        self._parts.append(
            f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" stroke="{INK}" stroke-width="{width:g}"/>'
        )

    def labelled(self, x: float, y: float, w: float, h: float, fill: str, *lines: str) -> None:
        """Draw a box with centred lines of text."""
        self.box(x, y, w, h, fill, INK)
        first = y + h / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + w / 2, first + 18 * number, line, "middle")

    def svg(self) -> str:
        """The whole file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}" '
                f'width="{WIDTH}" height="{self._height}" role="img" '
                'font-family="Helvetica, Arial, sans-serif">',
                f"<title>{self._title}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
                f'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/>'
                "</marker></defs>",
                f'<rect width="{WIDTH}" height="{self._height}" rx="6" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def place(row: int, column: int) -> tuple[int, int, int]:
    """Where a weight of a tile of 16 x 128 lies: lane, word (0 to 255), lowest of its four bits."""
    half, run, c, i = column // 64, column // 32 % 2, column // 8 % 4, column % 8
    lane = 4 * (row % 8) + c
    plane = 2 * run + i // 4
    word = half * 128 + lane * 4 + 2 * (i // 2 % 2) + row // 8
    return lane, word, 4 * plane + 16 * (i % 2)


def layout() -> str:
    """A tile of 16 x 128 weights, and the four words that a lane loads at once."""
    picture = Picture(470, "Which lane owns which weights of a tile of 16 x 128")
    own = 9
    left, top, width, height = 40, 62, 5, 10
    picture.text(left, 24, "A tile: 16 rows (outputs) x 128 columns (inputs)", bold=True)
    for c in range(4):
        picture.box(390 + 80 * c, 12, 14, 14, COLOURS[c])
        picture.text(410 + 80 * c, 24, f"c = {c}")
    for row in range(ROWS):
        for column in range(0, COLUMNS, 8):
            lane = place(row, column)[0]
            fill = STRONG if lane == own else COLOURS[lane % 4]
            picture.box(left + width * column, top + height * row, 8 * width, height, fill)
    for column in range(0, COLUMNS + 1, 8):
        x = left + width * column
        thick = 2.5 if column % 64 == 0 else 1.2 if column % 32 == 0 else 0.3
        picture.line(x, top, x, top + height * ROWS, thick)
        if column % 32 == 0:
            picture.text(x, top - 8, str(column), "middle", 13)
    for row in (0, 8, 16):
        picture.line(left, top + height * row, left + width * COLUMNS, top + height * row, 1.2)
        picture.text(left - 8, top + height * row + 5, str(row), "end", 13)
    y = top + height * ROWS + 24
    picture.text(left, y, "half 0: the first 16 bytes that a lane loads")
    picture.text(left + 64 * width + 6, y, "half 1: the second 16 bytes")
    y += 30
    picture.text(left, y, f"Dark: the weights of lane {own} = 4 x 2 + 1: rows 2 and 10, c = 1.")
    picture.text(left, y + 20, "Its four words of half 0, each weight as row, column:", bold=True)
    _words(picture, own, left, y + 38)
    return picture.svg()


def _words(picture: Picture, own: int, left: float, top: float) -> None:
    """The four words of a lane's first half, with the weight in each four bits."""
    owner = {
        place(row, column)[1:]: (row, column) for row in range(ROWS) for column in range(COLUMNS)
    }
    cell = 70
    for number in range(8):
        bit = 28 - 4 * number
        picture.text(left + 80 + cell * (number + 0.5), top, f"bits {bit}-{bit + 3}", "middle", 12)
    for word in range(4):
        y = top + 8 + 26 * word
        picture.text(left, y + 18, f"word {own * 4 + word}", size=13)
        for number in range(8):
            row, column = owner[own * 4 + word, 28 - 4 * number]
            x = left + 80 + cell * number
            picture.box(x, y, cell, 24, COLOURS[1] if number < 4 else COLOURS[5], INK)
            picture.text(x + cell / 2, y + 17, f"{row}, {column}", "middle", 13)


def paths() -> str:
    """Which kernel takes how many tokens."""
    picture = Picture(150, "Which kernel multiplies how many tokens")
    left, step = 40, 50
    bars = (
        (0, 4, COLOURS[0], "decode.py", "one read of the weight"),
        (4, 9, COLOURS[1], "fused.py", "int4 to bf16 in registers"),
        (9, 13, COLOURS[2], "prefill.py", "int4 to scratch, then cuBLAS"),
    )
    for first, last, fill, name, how in bars:
        x = left + step * first
        picture.box(x, 30, step * (last - first), 60, fill, INK)
        middle = x + step * (last - first) / 2
        picture.text(middle, 55, name, "middle", 15, bold=True)
        picture.text(middle, 76, how, "middle", 12 if last - first > 4 else 11)
    for power in range(14):
        x = left + step * power
        picture.line(x, 90, x, 97)
        picture.text(x, 113, str(2**power), "middle", 12)
    picture.text(left, 138, "tokens; where the second bar ends is a setting, by GPU and shape")
    return picture.svg()


def decode() -> str:
    """How programs and warps share tiles and chunks in decode."""
    picture = Picture(330, "Programs and warps over the weight in decode")
    left, top, w, h = 130, 60, 66, 40
    picture.text(left, 24, "K, in chunks of 128 columns", bold=True)
    picture.arrow(left + 200, 19, left + 270, 19)
    picture.text(20, top + 25, "N, tiles of", bold=True)
    picture.text(20, top + 43, "16 rows", bold=True)
    for chunk in range(8):
        picture.text(left + w * (chunk + 0.5), top - 8, str(chunk), "middle", 13)
        for tile in range(3):
            fill = COLOURS[2 * (chunk // 4) + chunk % 2]
            picture.box(left + w * chunk, top + h * tile, w, h, fill, INK)
            name = f"warp {chunk % 2}"
            picture.text(left + w * (chunk + 0.5), top + h * tile + 25, name, "middle", 13)
    picture.line(left + 4 * w, top - 20, left + 4 * w, top + 3 * h + 8, 3)
    y = top + 3 * h + 30
    picture.text(left + 2 * w, y, "program 0", "middle", 15, bold=True)
    picture.text(left + 6 * w, y, "program 1", "middle", 15, bold=True)
    for x in (left + 2 * w, left + 6 * w):
        picture.arrow(x, y + 10, x, y + 36)
    picture.labelled(left + w, y + 40, 2 * w, 34, GREY, "sums, fp32")
    picture.labelled(left + 5 * w, y + 40, 2 * w, 34, GREY, "sums, fp32")
    picture.arrow(left + 3 * w + 4, y + 57, left + 3.4 * w, y + 57)
    picture.arrow(left + 5 * w - 4, y + 57, left + 4.6 * w, y + 57)
    picture.labelled(left + 3.4 * w, y + 36, 1.2 * w, 42, "#ffffff", "+", "in order")
    picture.text(left + 4 * w, y + 104, "the last program to arrive adds, bf16 out", "middle")
    return picture.svg()


def fused() -> str:
    """Tiles of the result, whole ones first, then runs of the chunks of what is left (stream-K)."""
    picture = Picture(240, "Tiles and runs of chunks in fused")
    left, top, whole, w, h = 20, 50, 72, 36, 44
    runs, chunks, shared = 3, 6, 2
    for program in range(runs):
        x = left + whole * program
        picture.box(x, top, whole - 6, h, COLOURS[program], INK)
        picture.text(x + whole / 2 - 3, top - 10, f"tile {program}", "middle", bold=True)
        picture.text(x + whole / 2 - 3, top + 28, "all of K", "middle", 13)
        picture.text(x + whole / 2 - 3, top + h + 24, f"program {program}", "middle", 13)
    left += whole * runs + 20
    units = chunks * shared
    for unit in range(units):
        program = next(p for p in range(runs) if unit < (p + 1) * units // runs)
        picture.box(left + w * unit, top, w, h, COLOURS[program], INK)
        picture.text(left + w * (unit + 0.5), top + 28, str(unit % chunks), "middle", 13)
    for tile in range(shared + 1):
        x = left + w * chunks * tile
        picture.line(x, top - 22, x, top + h + 6, 3)
        if tile < shared:
            name = f"tile {runs + tile} of y"
            picture.text(x + w * chunks / 2, top - 10, name, "middle", bold=True)
    for program in range(runs):
        first, last = program * units // runs, (program + 1) * units // runs
        middle = left + w * (first + last) / 2
        picture.box(left + w * first + 3, top + h + 14, w * (last - first) - 6, 8, COLOURS[program])
        picture.text(middle, top + h + 42, f"program {program}", "middle", 15, bold=True)
    lines = (
        "First each program has tiles to itself, while there are enough for all. What is left is",
        "counted in chunks of 128 columns (the small boxes), and every program gets as many.",
        "A tile of several programs is added up by the last to arrive, in the order of K.",
    )
    for number, line in enumerate(lines):
        picture.text(20, 178 + 20 * number, line)
    return picture.svg()


def prefill() -> str:
    """Dequantize into scratch, then cuBLAS."""
    picture = Picture(190, "Prefill: through a buffer")
    picture.labelled(20, 40, 150, 70, COLOURS[0], "int4 words", "and scales")
    picture.arrow(172, 75, 236, 75)
    picture.text(204, 66, "unpack", "middle", 12)
    picture.labelled(
        240, 30, 190, 90, COLOURS[2], "scratch, bf16", "one for the model", "200 MiB at most"
    )
    picture.arrow(432, 75, 496, 75)
    picture.text(464, 66, "cuBLAS", "middle", 12)
    picture.labelled(500, 40, 200, 70, GREY, "y [tokens, N]")
    picture.labelled(500, 135, 200, 34, COLOURS[1], "x [tokens, K]")
    picture.arrow(600, 134, 600, 113)
    picture.text(20, 150, "A larger weight, an LM head say, goes")
    picture.text(20, 168, "through in parts of 64 n rows.")
    return picture.svg()


def experts() -> str:
    """Pairs of tokens and experts, planned and multiplied."""
    picture = Picture(330, "Pairs that share an expert")
    chosen = (7, 2, 5, 2, 7, 9)
    shades = {7: COLOURS[0], 2: COLOURS[1], 5: COLOURS[2], 9: COLOURS[3]}
    left, w = 110, 90
    picture.text(left + 1.5 * w, 24, "token 0", "middle", bold=True)
    picture.text(left + 4.5 * w, 24, "token 1", "middle", bold=True)
    picture.line(left + 3 * w, 8, left + 3 * w, 70, 2)
    picture.text(20, 56, "pairs", bold=True)
    for pair, expert in enumerate(chosen):
        x = left + w * pair
        picture.labelled(x + 3, 34, w - 6, 34, shades[expert], f"{pair}: expert {expert}")
        first = chosen.index(expert)
        picture.arrow(x + w / 2, 70, left + w * first + w / 2 + 8 * (pair != first), 128)
    picture.text(20, 104, "moe_plan", bold=True)
    picture.text(20, 156, "programs", bold=True)
    for pair, expert in enumerate(chosen):
        x = left + w * pair
        members = [str(p) for p, e in enumerate(chosen) if e == expert]
        if chosen.index(expert) == pair:
            picture.labelled(x + 3, 132, w - 6, 40, shades[expert], "for " + ", ".join(members))
        else:
            picture.labelled(x + 3, 132, w - 6, 40, "#ffffff", "idle")
    y = 196
    steps = ("x W1^T, activation", "h W2^T, router weight", "sum by token, in order")
    for number, step in enumerate(steps):
        x = left + 180 * number
        picture.labelled(x + 3, y, 168, 40, GREY, step)
        if number:
            picture.arrow(x - 8, y + 20, x + 2, y + 20)
    picture.text(20, y + 25, "then", bold=True)
    picture.text(
        20,
        272,
        "Each chosen expert is read once for up to 8 pairs: they are the 8 columns of one matrix",
    )
    picture.text(
        20, 292, "instruction. More than 512 pairs are sorted by expert instead (moe_grouped.py)."
    )
    return picture.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "kernels-paths.svg": paths,
    "kernels-layout.svg": layout,
    "kernels-decode.svg": decode,
    "kernels-fused.svg": fused,
    "kernels-prefill.svg": prefill,
    "kernels-experts.svg": experts,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all pictures into a folder."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/kernels.md.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
