# SPDX-License-Identifier: Apache-2.0
"""Two ranks give the tokens of one, exactly, in float32 on the CPU.

The shipped model is made for this: half of its MLP width is 336, so rank 1 starts 80 columns inside
a group, and its vocabulary needs padding.
"""

import pytest

from .engines import job, run_engines

pytestmark = pytest.mark.slow


def test_two_ranks_give_the_tokens_of_one(tiny_model, tmp_path):
    def tokens(ranks):
        engine = {"dtype": "float32", "tensor_parallel_size": ranks}
        folder = tmp_path / str(ranks)
        folder.mkdir()
        environment = {
            "NANOQUANT_TEST_MULTIPROCESS": "1",
            # One core for each rank; vLLM otherwise wants a NUMA node for each.
            "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks]),
        }
        jobs = [job("full", tiny_model, {"preset": "full"}, engine=engine)]
        report = run_engines(jobs, folder, environment)["full"]
        assert "error" not in report, report
        assert sum("15 modules to int4" in line for line in report["log"]) == ranks
        return report["tokens"]

    one, two = tokens(1), tokens(2)
    assert one == two
    assert all(len(answer) == 24 for answer in one)
