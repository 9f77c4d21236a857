# SPDX-License-Identifier: Apache-2.0
"""Check that a tag may be released, and print its section of CHANGELOG.md.

    python tools/release_notes.py v0.1.0

The tag must be the package's version with a "v" before it, and the section must have a date.
Needs nothing but Python's standard library.
"""

from __future__ import annotations

import re
import sys

from _console import ROOT, Failure, guarded

_SECTION = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>.+))?$", re.MULTILINE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def package_version(source: str) -> str:
    """The version that vllm_nanoquant/__init__.py gives.

    Raises:
        Failure: it gives none.
    """
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise Failure("vllm_nanoquant/__init__.py has no line like __version__ = '0.1.0'")
    return found.group(1)


def notes(tag: str, version: str, changelog: str) -> str:
    """What CHANGELOG.md says of a release, without its heading.

    Args:
        tag: of git, as ``v0.1.0``.
        version: of the package.
        changelog: the whole file.

    Raises:
        Failure: the tag is another version's, or its section is missing, empty or has no date.
    """
    if tag != f"v{version}":
        raise Failure(
            f"the tag is {tag!r} and the package's version is {version}: tag v{version}, or change "
            "__version__ in vllm_nanoquant/__init__.py first"
        )
    sections = list(_SECTION.finditer(changelog))
    for section, following in zip(sections, [*sections[1:], None], strict=True):
        if section["version"] != version:
            continue
        if section["date"] is None or not _DATE.fullmatch(section["date"]):
            raise Failure(
                f"CHANGELOG.md has {section.group()!r}: put the day of the release there, "
                f"as in '## [{version}] - 2026-01-31'"
            )
        text = changelog[section.end() : following.start() if following else None].strip()
        if not text:
            raise Failure(f"CHANGELOG.md says nothing about {version}")
        return text
    raise Failure(f"CHANGELOG.md has no section '## [{version}] - YEAR-MONTH-DAY'")


def main() -> None:
    """Print the notes of the tag that was given."""
    if len(sys.argv) != 2:
        raise Failure("usage: python tools/release_notes.py TAG")
    source = (ROOT / "vllm_nanoquant" / "__init__.py").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    print(notes(sys.argv[1], package_version(source), changelog))


if __name__ == "__main__":
    sys.exit(guarded(main))
