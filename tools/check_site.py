# SPDX-License-Identifier: Apache-2.0
"""Check that the built documentation needs no network: every page, script, style and picture.

    python tools/check_site.py build/docs

MkDocs itself checks links and anchors between pages (`mkdocs build --strict`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself; an `a` is fetched when somebody follows it.
_FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
_NOT_FETCHED = {"canonical", "next", "prev"}
_REMOTE = re.compile(r"^(https?:)?//")
_REMOTE_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\"')\s]+")


class _Fetched(HTMLParser):
    """Collects what a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one tag."""
        given = dict(attrs)
        address = given.get(_FETCHED.get(tag, ""))
        if address and not set((given.get("rel") or "").split()) & _NOT_FETCHED:
            self.addresses.append(address)


def problems(site: Path) -> Iterator[str]:
    """Say what a browser would fetch from elsewhere, and what is not in the site."""
    for page in sorted(site.rglob("*.html")):
        found = _Fetched()
        found.feed(page.read_text(encoding="utf-8"))
        for address in found.addresses:
            if _REMOTE.match(address):
                yield f"{page.relative_to(site)}: fetches {address}"
            elif not address.startswith("data:") and page.name != "404.html":
                target = (page.parent / address.partition("#")[0].partition("?")[0]).resolve()
                if not target.exists():
                    yield f"{page.relative_to(site)}: {address} is not in the site"
    for style in sorted(site.rglob("*.css")):
        for found_url in _REMOTE_STYLE.finditer(style.read_text(encoding="utf-8")):
            yield f"{style.relative_to(site)}: fetches {found_url[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every problem; exit status 1 if there is one."""
    parser = argparse.ArgumentParser(description="Check that built documentation needs no network.")
    parser.add_argument("site", type=Path, help="folder of the built site")
    site = parser.parse_args(arguments).site
    pages = list(site.rglob("*.html"))
    if not pages:
        parser.error(f"{site} has no page; build it with: make docs")
    found = list(problems(site))
    for problem in found:
        print(problem)
    print(f"{len(pages)} pages: " + (f"{len(found)} problems" if found else "no network needed"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
