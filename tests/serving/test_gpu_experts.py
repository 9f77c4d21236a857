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
    """Mean and median of the tokens' relative errors up to the first token that differs."""
    found, _ = relative_errors(lab.answers(name, "plain"), lab.answers(oracle, "plain"))
    mean, median = statistics.mean(found), statistics.median(found)
    print(
        f"{name} against {oracle}: relative error of the logits of {len(found)} tokens: "
        f"mean {mean:.2e}, median {median:.2e}"
    )
    return mean, median


@pytest.mark.parametrize(
    ("name", "against"),
    [("int4", "bf16"), ("int4 graphs", "bf16"), ("int4 graphs", "int4")],
)
def test_logits_agree_as_well_as_those_of_bf16_compiled_and_eager(lab, name, against):
    own_mean, own_median = errors(lab, "bf16 graphs", "bf16")
    mean, median = errors(lab, name, against)
    assert mean <= 1.5 * own_mean
    assert median <= 1.5 * own_median
