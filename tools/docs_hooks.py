# SPDX-License-Identifier: Apache-2.0
"""What mkdocs asks while it builds the documentation: pages and links that lie outside of docs/.

CONTRIBUTING.md and CHANGELOG.md stay where GitHub looks for them, and are pages of the site, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
GENERATED = ("CONTRIBUTING.md", "CHANGELOG.md")

# Whoever types an error message into the search wants these first.
FIRST_IN_SEARCH = ("errors.md", "messages.md")

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")
_LINK_OUT = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)]*)?\)")


def _link(found: re.Match[str]) -> str:
    """A link to a path of the repository, as the site has it; the text alone if it is no page.

    Raises:
        ValueError: there is no such file or folder.
    """
    text, target, anchor = found[1], found[2], found[3] or ""
    if target in PAGES:
        return f"[{text}]({PAGES[target]}{anchor})"
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')}{anchor})"
    if not (ROOT / target).exists():
        raise ValueError(f"[{text}]({target}): there is no {target} in the repository")
    return text


def moved(text: str) -> str:
    """The text of a page of the repository's root, with the links of one in docs/."""
    return _LINK.sub(_link, text)


def on_files(files: Files, /, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages."""
    from mkdocs.structure.files import File

    for source in GENERATED:
        text = moved((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, PAGES[source], content=text))
    return files


def on_page_markdown(markdown: str, /, *, page: Page, **_: Any) -> str:
    """Mend links that on GitHub lead out of docs/."""
    if page.file.src_uri in FIRST_IN_SEARCH:
        page.meta["search"] = {"boost": 4}
    return _LINK_OUT.sub(_link, markdown)
