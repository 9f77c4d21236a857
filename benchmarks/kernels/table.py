# SPDX-License-Identifier: Apache-2.0
"""Put the figures of a result file into Markdown files.

    python benchmarks/kernels/table.py RESULT.json --write README.md docs/benchmarks.md
    python benchmarks/kernels/table.py RESULT.json --check README.md docs/benchmarks.md

What lies between the lines `<!-- kernels:begin -->` and `<!-- kernels:end -->` is replaced: in a
file called README.md by a summary, in any other by all tables. With --check nothing is written,
and the status is 1 unless every file is up to date. With neither, the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.results import Results
from benchmarks.kernels.sections import full, summary
from vllm_nanoquant.files import write_whole

BEGIN = "<!-- kernels:begin -->"
END = "<!-- kernels:end -->"


def section_for(path: Path, results: Results) -> str:
    """The tables that belong into this file."""
    return summary(results) if path.name == "README.md" else full(results)


def replace_section(text: str, section: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The text with the section in the place of what is between the two markers.

    Raises:
        ValueError: the markers are not there once each, in that order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"it needs one line {begin} and after it one line {end}")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{section.strip()}\n{end}{after}"


def update(path: Path, section: str, write: bool, markers: tuple[str, str] = (BEGIN, END)) -> bool:
    """Whether a file has this section between its markers; if not and `write`, it has now.

    Raises:
        ValueError: the file cannot be read or written, or has no markers; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        wanted = replace_section(text, section, markers)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if write and text != wanted:
        try:
            write_whole(path, wanted)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error
    return text == wanted


def add_markdown_files(parser: argparse.ArgumentParser) -> None:
    """Add --check and --write, either of which takes Markdown files."""
    mode = parser.add_mutually_exclusive_group()
    for name, what in (("--check", "status 1 unless up to date"), ("--write", "bring up to date")):
        mode.add_argument(
            name, type=Path, nargs="+", default=[], metavar="FILE", help=f"Markdown files: {what}"
        )


def tell_stale(fresh: dict[Path, bool], options: argparse.Namespace) -> int:
    """Name the files that were not up to date; the exit status for `add_markdown_files`."""
    stale = [path for path, is_fresh in fresh.items() if not is_fresh]
    for path in stale:
        print(f"{path}: {'written' if options.write else 'is not up to date'}")
    return int(bool(options.check and stale))


def put_section(
    arguments: Sequence[str] | None,
    description: str,
    made_by: str,
    tables: Callable[[dict[str, Any]], str],
    markers: tuple[str, str],
) -> int:
    """A whole command line that puts the tables of one result file between two markers.

    Args:
        arguments: of the command line; None for this process's.
        description: what it does, for --help.
        made_by: the script that writes such result files.
        tables: makes Markdown out of the JSON.
        markers: lines of the Markdown files between which it belongs.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("result", type=Path, help=f"JSON file of {made_by}")
    add_markdown_files(parser)
    options = parser.parse_args(arguments)
    files = [*options.check, *options.write]
    try:
        section = tables(json.loads(options.result.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        parser.error(f"{options.result}: {error}")
    except (AttributeError, LookupError, TypeError) as error:  # JSON of another script
        parser.error(f"{options.result} is not a result of {made_by}: {error!r}")
    try:
        fresh = {path: update(path, section, bool(options.write), markers) for path in files}
    except ValueError as error:
        parser.error(str(error))
    if not files:
        print(section)
    return tell_stale(fresh, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON file of run.py")
    add_markdown_files(parser)
    options = parser.parse_args(arguments)
    files = [*options.check, *options.write]
    try:
        results = Results.read(options.result)
        if not files:
            print(f"{summary(results)}\n\n{full(results)}")
        fresh = {
            path: update(path, section_for(path, results), bool(options.write)) for path in files
        }
    except ValueError as error:
        parser.error(str(error))
    return tell_stale(fresh, options)


if __name__ == "__main__":
    sys.exit(main())
