# SPDX-License-Identifier: Apache-2.0
"""Two ranks give the tokens of one, in float32 on the CPU, and the same bytes by both ways in.

The shipped model is made for this: half of its MLP width is 336, so rank 1 starts 80 columns inside
a group, and its vocabulary needs padding.
"""

import pytest

from tests.checkpoints import write_int4

from .engines import job, run_engines

pytestmark = pytest.mark.slow


def run(ranks, folder, models):
    """Reports of engines on `models`, by name: (folder, options)."""
    engine = {"dtype": "float32", "tensor_parallel_size": ranks}
    folder.mkdir()
    environment = {
        "NANOQUANT_TEST_MULTIPROCESS": "1",
        # One core for each rank; vLLM otherwise wants a NUMA node for each.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks]),
        # For the digests: functions that go to the workers are pickled.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    jobs = [
        job(name, model, options, engine=dict(engine), digests=True)
        for name, (model, options) in models.items()
    ]
    reports = run_engines(jobs, folder, environment)
    for report in reports.values():
        assert "error" not in report, report
        assert all(len(answer) == 24 for answer in report["tokens"])
    return reports


def test_two_ranks_give_the_tokens_of_one_and_an_int4_checkpoint_the_same_bytes(
    tiny_model, tmp_path
):
    models = {
        "full": (tiny_model, {"preset": "full"}),
        "stored": (write_int4(tiny_model, tmp_path / "int4", preset="full"), None),
    }
    one = run(1, tmp_path / "one", {"full": models["full"]})
    two = run(2, tmp_path / "two", models)
    assert one["full"]["tokens"] == two["full"]["tokens"] == two["stored"]["tokens"]
    for name, line in (("full", "15 modules to int4"), ("stored", "loaded 15 int4 modules")):
        assert sum(line in text for text in two[name]["log"]) == 2
    first, second = two["full"]["digests"]
    assert first != second
    assert two["stored"]["digests"] == [first, second]
