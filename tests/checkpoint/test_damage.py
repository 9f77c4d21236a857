# SPDX-License-Identifier: Apache-2.0
"""Random damage: it may end in findings or in our own error, and in nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.strategies import MANY, values
from vllm_nanoquant.checkpoint.errors import CheckpointError
from vllm_nanoquant.checkpoint.inspect import inspect
from vllm_nanoquant.checkpoint.verify import verify

INDEX = "model.safetensors.index.json"
REPORT = "nanoquant_report.json"


def check_damage(folder, name, data):
    """No damage may end in anything but findings, or in our own error."""
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    try:
        problems = verify(folder).problems
        assert all(problem.isprintable() for problem in problems)
        if data != original and name != REPORT:
            assert problems
        try:
            inspect(folder)
        except CheckpointError as error:
            assert str(error).isprintable()
    finally:
        (folder / name).write_bytes(original)


@pytest.fixture(scope="module")
def damaged(pristine, tmp_path_factory):
    return Path(shutil.copytree(pristine[1], tmp_path_factory.mktemp("damaged") / "target"))


FILES = ["config.json", INDEX, REPORT, "model-00001", "model-00002"]


@pytest.mark.slow
@MANY
@given(choice=st.data())
def test_random_damage(damaged, choice):
    prefix = choice.draw(st.sampled_from(FILES))
    path = next(path for path in sorted(damaged.iterdir()) if path.name.startswith(prefix))
    data = bytearray(path.read_bytes())
    # Mostly where structure is: the first bytes, the header.
    places = st.integers(0, min(len(data), 3000) - 1) | st.integers(0, len(data) - 1)
    for _ in range(choice.draw(st.integers(1, 3))):
        start = min(choice.draw(places), len(data))
        stop = start + choice.draw(st.integers(0, 9))
        data[start:stop] = choice.draw(st.binary(max_size=9))
    check_damage(damaged, path.name, bytes(data))


@pytest.mark.slow
@MANY
@given(choice=st.data())
def test_random_values_in_json(damaged, choice):
    name = choice.draw(st.sampled_from(["config.json", INDEX, REPORT]))
    root = json.loads((damaged / name).read_text())
    node = root
    while True:
        key = choice.draw(st.sampled_from(sorted(node)))
        inner = node[key]
        if not isinstance(inner, dict) or not inner or choice.draw(st.integers(0, 3)) == 0:
            break
        node = inner
    node[key] = choice.draw(values)
    original = json.loads((damaged / name).read_text())
    if root != original:
        check_damage(damaged, name, json.dumps(root).encode())
