# SPDX-License-Identifier: Apache-2.0
"""English text out of documentation packages of Debian main, which are all free to use and share.

packages.json names each package with its version and SHA-256. Pages are taken out of the packages
without unpacking them to disk, reduced to paragraphs, and kept if they are English prose and not
said before: navigation and boilerplate go with the paragraphs that repeat.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_model.text import join_paragraphs, read_string_vectors

PACKAGES = Path(__file__).with_name("packages.json")

_PAGE = re.compile(r"\.(html?|xhtml|txt|rst|pod|page|docbook|md|rdb)(\.gz)?$")
_DATABASE = re.compile(r"/data/Rdata\.rdb$")
# Other languages' translations, and pages that are lists: indexes, changelogs, licences, source.
_UNWANTED = re.compile(
    r"/(?!en|C/)[a-z]{2}([_-][A-Za-z]{2,4})?/|[._-](?!en)(?:de|es|fr|it|ja|ko|nl|pl|pt|ru|tr|zh|da"
    r"|sv|ca|cs|el|fi|hu|nb|ro|sk|uk|vi|sl)([_-]\w+)?\.(html?|txt)|changelog|copyright|license"
    r"|(?:gen|^|/)index|-all\.html|allclasses|package-(?:tree|use)|class-use|/_modules/|/src/"
    r"|_source\.html|constant-values|deprecated-list|overview-tree",
    re.IGNORECASE,
)
_DROPPED = re.compile(
    r"<(script|style|head|nav|header|footer|form|button)\b.*?</\1\s*>|<!--.*?-->",
    re.DOTALL | re.IGNORECASE,
)
_BLOCK = re.compile(
    r"</?(?:p|div|h[1-6]|li|ul|ol|dl|dt|dd|table|tr|pre|section|article|blockquote|hr|title|note|"
    r"para|item|body)\b[^>]*>|<br\s*/?>\s*<br\s*/?>",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]*>")
_STOP_WORDS = re.compile(r"\b(?:the|of|and|to|is|in|that|for|be|with|it|as|are)\b", re.IGNORECASE)
_MIN_STOP_WORDS = 0.10  # of all words: about a quarter in prose, next to none in tables
_MIN_CHARACTERS = 600
_LONG = 60  # a paragraph from here on is kept once, a shorter one a few times
_REPEATS = 3
_MAX_PACKAGE = 3_500_000  # characters, or references of large libraries would drown the manuals


@dataclass(frozen=True)
class Document:
    """One page of a package.

    Attributes:
        source: package and path.
        text: paragraphs apart by blank lines.
    """

    source: str
    text: str


def fetch_packages(folder: Path) -> list[Path]:
    """Download what packages.json names, unless it is there; in its order.

    Raises:
        RuntimeError: apt-get cannot fetch a package, or its bytes are not the recorded ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in json.loads(PACKAGES.read_text(encoding="utf-8")):
        path = folder / entry["file"]
        if not path.exists():
            name = f"{entry['package']}={entry['version']}"
            done = subprocess.run(
                ["apt-get", "download", name], cwd=folder, capture_output=True, text=True
            )
            if done.returncode or not path.exists():
                raise RuntimeError(f"apt-get download {name} failed:\n{done.stderr}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != entry["sha256"]:
            raise RuntimeError(f"{path} has SHA-256 {digest}; packages.json has {entry['sha256']}")
        found.append(path)
    return found


def documents(packages: Iterable[Path]) -> Iterator[Document]:
    """The packages' English pages, cleaned, each paragraph once."""
    seen: Counter[int] = Counter()
    for package in packages:
        characters = 0
        for source, text in sorted(_pages(package)):
            kept = []
            for paragraph in text.split("\n\n"):
                key = hash(paragraph)
                seen[key] += 1
                if seen[key] <= (1 if len(paragraph) >= _LONG else _REPEATS):
                    kept.append(paragraph)
            clean = "\n\n".join(kept)
            if len(clean) >= _MIN_CHARACTERS and _is_prose(clean):
                yield Document(source, clean)
                characters += len(clean)
            if characters > _MAX_PACKAGE:
                break


def _pages(package: Path) -> Iterator[tuple[str, str]]:
    """Path and paragraphs of every page of a package."""
    name = package.name.partition("_")[0]
    unpacked = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        for member in archive:
            path = member.name.removeprefix(".")
            if not member.isfile() or not _PAGE.search(path) or _UNWANTED.search(path):
                continue
            stored = archive.extractfile(member)
            assert stored is not None  # a regular file has content
            content = stored.read()
            if _DATABASE.search(path):
                for number, lines in enumerate(read_string_vectors(content)):
                    yield f"{name}:{path}#{number}", join_paragraphs([s.strip() for s in lines])
                continue
            if path.endswith(".rdb"):
                continue
            if path.endswith(".gz"):
                content = gzip.decompress(content)
            text = content.decode("utf-8", errors="replace")
            plain = re.search(r"\.(txt|rst|pod|md)(\.gz)?$", path)
            yield f"{name}:{path}", _plain(text) if plain else page_text(text)


def page_text(markup: str) -> str:
    """Paragraphs of an HTML or XML page, without its tags, scripts and navigation."""
    text = _BLOCK.sub("\n\n", _DROPPED.sub(" ", markup))
    return _plain(html.unescape(_TAG.sub("", text)))


def _plain(text: str) -> str:
    text = text.replace("\r", "").replace("\u00b6", "").replace("\xa0", " ")
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    paragraphs = (part.strip("\n") for part in re.split(r"\n{2,}", lines))
    return "\n\n".join(part for part in paragraphs if part.strip())


def _is_prose(text: str) -> bool:
    words = len(text.split())
    letters = sum(map(str.isascii, text[:20000])) / min(len(text), 20000)
    return letters > 0.97 and len(_STOP_WORDS.findall(text)) > _MIN_STOP_WORDS * words
