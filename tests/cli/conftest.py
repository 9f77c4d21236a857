# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.checkpoint.small import write_stock
from vllm_nanoquant.cli.main import main


@pytest.fixture
def source(tmp_path):
    return write_stock(tmp_path / "source", _name_or_path="maker/model")


@pytest.fixture
def run(capsys):
    """Runs a command; gives exit status, standard output, standard error."""

    def run_command(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command
