# SPDX-License-Identifier: Apache-2.0
"""A small Nemotron-H with routed experts on a GPU, eager and compiled with CUDA graphs.

The oracle is a BF16 model with the weights that the integers stand for. Where two experts' scores
are nearly equal, other last bits choose another expert, and the logits of that token are others: so
it is between BF16's own compiled and eager forms, which are the measure here.
"""

import statistics

import pytest

from tests.dequantized import write_dequantized
from tests.moe_models import write_nemotron_moe

from .features import Lab, ask, engines_at_once, feature_job, prompts, relative_errors

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

GRAPHS = {"enforce_eager": False}
SECONDS = 100
LIMIT = 1e-2


@pytest.fixture(scope="module")
def lab(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    model = write_nemotron_moe(tiny_model, folder / "int4")
    bf16 = write_dequantized(model, folder / "bf16")
    short, long = prompts(tiny_model).values()
    asked = [ask("plain", short + long)]

    def job(name, model, quantized, **engine):
        engine |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30}
        return feature_job(name, model, asked, quantized, **engine)

    jobs = [
        job("bf16", bf16, False),
        job("bf16 graphs", bf16, False, **GRAPHS),
        job("int4", model, True),
        job("int4 graphs", model, True, **GRAPHS),
    ]
    environment = {"VLLM_CACHE_ROOT": str(folder / "cache")}
    laboratory = Lab(folder, [[each] for each in jobs], SECONDS, environment)
    laboratory.run_ahead([each["name"] for each in jobs], engines_at_once())
    return laboratory


def errors(lab, name, oracle):
    """Of each token, and the share of tokens beyond `LIMIT`, which took another expert."""
    found, _ = relative_errors(lab.answers(name, "plain"), lab.answers(oracle, "plain"))
    share = sum(error > LIMIT for error in found) / len(found)
    print(
        f"{name} against {oracle}: mean relative error {statistics.mean(found):.2e}, median "
        f"{statistics.median(found):.2e}, {share:.0%} of {len(found)} tokens above {LIMIT}"
    )
    return found, share


@pytest.mark.parametrize(
    ("name", "against"),
    [("int4", "bf16"), ("int4 graphs", "bf16"), ("int4 graphs", "int4")],
)
def test_logits_agree_as_well_as_those_of_bf16_compiled_and_eager(lab, name, against):
    own, own_share = errors(lab, "bf16 graphs", "bf16")
    found, share = errors(lab, name, against)
    assert statistics.median(found) <= LIMIT
    assert share <= own_share + 0.05
    assert statistics.mean(found) <= 1.5 * max(LIMIT, statistics.mean(own))
