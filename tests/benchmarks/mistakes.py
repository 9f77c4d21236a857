# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's command line says of a mistake."""

import pytest


def said(capsys, main, *arguments):
    """The last line of standard error, after an end with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
