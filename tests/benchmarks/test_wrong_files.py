# SPDX-License-Identifier: Apache-2.0
"""Tools that read result files name the file that is wrong, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.end_to_end import table as end_to_end
from benchmarks.evidence import page
from benchmarks.kernels import moe_table, predict, table
from benchmarks.quality import llm_compressor
from tests.benchmarks.mistakes import said

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KERNELS = BENCHMARKS / "kernels" / "results" / "h200.json"
CONTEST = BENCHMARKS / "end_to_end" / "results" / "h200-nano9b-contest.json"
LOADED = BENCHMARKS / "end_to_end" / "results" / "h200-nano9b-load.json"


@pytest.mark.parametrize("main", [end_to_end.main, moe_table.main])
def test_a_file_of_another_script_is_named(main, capsys):
    assert f"{KERNELS} is not a result of" in said(capsys, main, KERNELS)


def test_contestants_that_all_failed_make_no_table(tmp_path, capsys):
    report = json.loads(CONTEST.read_text("utf-8"))
    failed = tmp_path / "failed.json"
    report["results"] = {"bf16": {"error": ["no memory"], "status": 1}}
    failed.write_text(json.dumps(report))
    assert f"{failed}: every contestant failed" in said(capsys, end_to_end.main, failed)


def test_loading_alone_makes_no_table(tmp_path, capsys):
    docs = tmp_path / "page.md"
    docs.write_text("\n".join(end_to_end.MARKERS))
    message = said(capsys, end_to_end.main, LOADED, "--write", docs)
    assert f"{LOADED}: nothing was timed: run.py without --only-load" in message
    assert docs.read_text() == "\n".join(end_to_end.MARKERS)


def test_predictions_are_not_read_from_another_file(capsys):
    message = said(capsys, predict.main, "--read", CONTEST)
    assert f"{CONTEST} is not a result of predict.py" in message


@pytest.mark.parametrize("option", ["--evidence", "--training", "--contest", "--tool"])
def test_the_page_names_the_wrong_file(option, tmp_path, capsys):
    message = said(capsys, page.main, option, KERNELS, "--docs", tmp_path, "--no-plots")
    assert f"{KERNELS} is another script's result" in message
    assert not list(tmp_path.iterdir())


def test_the_page_needs_its_folder(tmp_path, capsys):
    message = said(capsys, page.main, "--docs", tmp_path / "none", "--no-plots")
    assert f"there is no folder {tmp_path / 'none'}: --docs" in message


def full_disk(monkeypatch):
    def replace(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)


def test_a_page_that_cannot_be_written_stays(tmp_path, monkeypatch, capsys):
    docs = tmp_path / "README.md"
    docs.write_text(f"{table.BEGIN}\n{table.END}\n")
    full_disk(monkeypatch)
    message = said(capsys, table.main, KERNELS, "--write", docs)
    assert f"cannot write {docs}: No space left" in message
    assert docs.read_text() == f"{table.BEGIN}\n{table.END}\n"


def test_the_record_of_llm_compressor_is_whole_and_its_folder_is_there(tmp_path, monkeypatch):
    output, text = tmp_path / "a" / "b", tmp_path / "text"

    def compress(variant, arguments):
        assert output.is_dir()
        if variant == "rtn-asym":
            full_disk(monkeypatch)
        return {"group_size": 32}

    monkeypatch.setattr(llm_compressor, "version", lambda name: "1.0")
    monkeypatch.setattr(llm_compressor, "compress", compress)
    arguments = ["x", str(tmp_path), str(output), "--calibration-text", str(text)]
    monkeypatch.setattr("sys.argv", [*arguments, "--variants", "rtn-sym", "rtn-asym"])
    with pytest.raises(OSError, match="No space"):
        llm_compressor.main()
    assert list(json.loads((output / llm_compressor.RECORD).read_text())) == ["packages", "rtn-sym"]
