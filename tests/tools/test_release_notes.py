# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import release_notes
from _console import ROOT, Failure, guarded

import vllm_nanoquant

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-03-01

### Added

- Two.

## [0.1.1] - unreleased

- One and a bit.

## [0.1.0]

## [0.0.9] - 2026-01-01
"""


def test_version_is_the_packages():
    source = (ROOT / "vllm_nanoquant" / "__init__.py").read_text()
    assert release_notes.package_version(source) == vllm_nanoquant.__version__
    with pytest.raises(Failure, match="no line like"):
        release_notes.package_version("version = '1'\n")


def test_notes_are_the_section_alone():
    assert release_notes.notes("v0.2.0", "0.2.0", CHANGELOG) == "### Added\n\n- Two."


@pytest.mark.parametrize(
    "tag, version, why",
    [
        ("v0.2.1", "0.2.0", "the tag is 'v0.2.1' and the package's version is 0.2.0"),
        ("0.2.0", "0.2.0", "the tag is '0.2.0'"),
        ("v0.1.1", "0.1.1", "put the day of the release there"),
        ("v0.1.0", "0.1.0", "put the day of the release there"),
        ("v0.0.9", "0.0.9", "says nothing about 0.0.9"),
        ("v0.3.0", "0.3.0", "has no section"),
    ],
)
def test_what_may_not_be_released(tag, version, why):
    with pytest.raises(Failure, match=why):
        release_notes.notes(tag, version, CHANGELOG)


def test_a_wrong_tag_is_one_line_and_a_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["release_notes.py", "v9.9.9"])
    assert guarded(release_notes.main) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
