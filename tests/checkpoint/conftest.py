# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.small import weights, write_stock
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.recipe import Recipe


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    source = write_stock(folder / "source", weights(wide=32))
    target = folder / "target"
    prepare(Request("source", source, target, Recipe(group_size=32), 10_000)).run()
    return source, target


@pytest.fixture
def target(pristine, tmp_path):
    return Path(shutil.copytree(pristine[1], tmp_path / "target"))
