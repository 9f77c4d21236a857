# SPDX-License-Identifier: Apache-2.0
"""The command ``nanoquant convert``."""

import json

import torch

from tests.checkpoint.foreign import AWQ, UP, awq_checkpoint, fp8_checkpoint, write
from vllm_nanoquant.cli.main import main


def run(*arguments):
    return main(["convert", *map(str, arguments)])


def test_the_command(tmp_path, capsys):
    source = awq_checkpoint(tmp_path / "a")
    assert run(source, tmp_path / "b", "--max-shard-size", "1MB") == 0
    told = capsys.readouterr()
    assert "2 weights that the source holds quantized become BF16" in told.err
    text = told.out
    assert "2 weights taken over as they are, 0 quantized again" in text
    assert "scales were rounded to bf16" in text
    assert f"vllm serve {tmp_path / 'b'}" in text
    assert run(source, tmp_path / "b", "--json", "--max-shard-size", "1MB") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["done_before"] and result["int4"] == 2


def test_the_command_warns_of_a_second_error(tmp_path, capsys):
    source, _ = fp8_checkpoint(tmp_path / "a")
    assert run(source, tmp_path / "b", "--algorithm", "mse") == 0
    told = capsys.readouterr()
    assert "warning: 1 weights are not int4 in the source and are quantized again" in told.err
    assert "mean relative error 0." in told.out


def test_exit_statuses(tmp_path, capsys):
    assert run(tmp_path / "none", tmp_path / "b") == 2
    source = write(tmp_path / "a", AWQ, {f"{UP}.qweight": torch.ones(2, 2).int()})
    assert run(source, tmp_path / "b") == 1
    assert "up_proj' has qweight but not scales" in capsys.readouterr().err
    assert run(source, source / "inside") == 2
