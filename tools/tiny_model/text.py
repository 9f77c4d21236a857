"""The training text: Jane Austen's six novels, out of a Debian package, or the user's own files."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATABASE = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")

_HEADING = re.compile(r"(?:chapter|letter|volume|vol\.) *[ivxlc\d]+\.?", re.IGNORECASE)
_CHAPTER = re.compile(r"chapter *[ivxlc\d]+\.?", re.IGNORECASE)
_ENDING = re.compile(r"finis|the end|\*vide a letter from .*|a note on the text", re.IGNORECASE)


@dataclass
class Corpus:
    """Chapters of clean text, split three ways; no chapter is in two of them."""

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)


def load_corpus(files: list[Path]) -> Corpus:
    """Split the novels, or ``files`` if any are given, into the three parts.

    Of every novel the last chapter is held out and the middle one is for validation.

    Raises:
        ValueError: if a text has too few chapters to be split.
    """
    novels = [f.read_text(encoding="utf-8").splitlines() for f in files] or fetch_novels()
    corpus = Corpus()
    for lines in novels:
        chapters = split_chapters(lines)
        if len(chapters) < 3:
            raise ValueError(f"text beginning {lines[:1]} has fewer than 3 'Chapter N' headings")
        corpus.heldout.append(chapters.pop())
        corpus.validation.append(chapters.pop(len(chapters) // 2))
        corpus.train.extend(chapters)
    return corpus


def fetch_novels() -> list[list[str]]:
    """Download the Debian package and return each novel as a list of lines.

    Raises:
        RuntimeError: if apt-get or dpkg-deb is missing, or the download fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} not found: the text comes from the Debian package {PACKAGE}; "
                "run this on Debian or Ubuntu, or give plain text files with --text"
            )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt drops its privileges for the download
        done = subprocess.run(
            ["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True
        )
        packages = sorted(folder.glob("*.deb"))
        if done.returncode != 0 or not packages:
            raise RuntimeError(
                f"apt-get download {PACKAGE} failed (is 'apt-get update' done?):\n{done.stderr}"
            )
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder)], check=True)
        return list(read_string_vectors((folder / DATABASE).read_bytes()))


def read_string_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield every character vector of an R lazy-load database (.rdb).

    A database is a row of records, each a big-endian byte count followed by a zlib stream, which
    holds one serialized R object. The streams say where they end, so no index is needed.
    """
    offset = 0
    while offset < len(database):
        inflate = zlib.decompressobj()
        yield parse_string_vector(inflate.decompress(database[offset + 4 :]))
        offset = len(database) - len(inflate.unused_data)


def parse_string_vector(data: bytes) -> list[str]:
    """Read a character vector from R's binary (XDR) serialization, version 2 or 3.

    Raises:
        ValueError: if ``data`` holds anything else.
    """
    string_vector, missing = 16, -1
    if data[:2] != b"X\n":
        raise ValueError("not an R object in XDR serialization")
    (version,) = struct.unpack_from(">i", data, 2)
    offset = 14  # after the format mark and three version numbers
    if version == 3:  # these name the writer's character encoding, too
        offset += 4 + struct.unpack_from(">i", data, offset)[0]
    flags, count = struct.unpack_from(">II", data, offset)
    if flags & 0xFF != string_vector:
        raise ValueError(f"R object of type {flags & 0xFF} instead of a character vector")
    offset += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", data, offset)
        offset += 8
        if length != missing:
            strings.append(data[offset : offset + length].decode("utf-8"))
            offset += length
    return strings


def split_chapters(lines: list[str]) -> list[str]:
    """Cut a novel into chapters of clean paragraphs, without headings and end notes."""
    chapters: list[list[str]] = []
    for line in (line.strip() for line in lines):
        if _CHAPTER.fullmatch(line):
            chapters.append([])
        elif _ENDING.fullmatch(line) and chapters:
            break
        elif chapters and not _HEADING.fullmatch(line):
            chapters[-1].append(line)
    return [text for text in map(join_paragraphs, chapters) if text]


def join_paragraphs(lines: list[str]) -> str:
    """Undo line wrapping: one line a paragraph, paragraphs apart by a blank line.

    The marks around emphasised words (``_so_``) go, too.
    """
    paragraphs = []
    for block in "\n".join(lines).replace("_", "").split("\n\n"):
        # A dash or a hyphen at the end of a line joins the next word without a space.
        joined = re.sub(r"-\n", "-", block.strip())
        if joined:
            paragraphs.append(re.sub(r"\s+", " ", joined))
    return "\n\n".join(paragraphs)
