# SPDX-License-Identifier: Apache-2.0
"""vLLM's second model runner, which is that of hybrids from 0.29 on, beside the first."""

import pytest
import torch

from .engines import LOGITS, job, run_engines

pytestmark = pytest.mark.slow

# float32, so that a token does not hang on the last bit.
EXACT = {"dtype": "float32", "max_model_len": 256, **LOGITS}
IDS = [[5, 9, 77, 130, 8, 21, 6], [50, 93], [411]]
RECIPES = {"eager": {"preset": "full"}, "compiled": {"preset": "balanced", "group_size": 64}}


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    """Reports by model runner: "1" and "2"."""

    def of_runner(number):
        folder = tmp_path_factory.mktemp(f"runner{number}")
        jobs = [
            job(name, tiny_model, recipe, engine=EXACT | {"enforce_eager": name == "eager"})
            | {"ids": IDS, "reload": name == "eager"}
            for name, recipe in RECIPES.items()
        ]
        return run_engines(jobs, folder, {"VLLM_USE_V2_MODEL_RUNNER": str(number - 1)})

    return {number: of_runner(number) for number in (1, 2)}


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_and_logits_are_those_of_the_first(reports, name):
    first, second = reports[1][name], reports[2][name]
    assert "error" not in first, first
    assert "error" not in second, second
    assert second["texts"] == first["texts"] and all(second["texts"])
    assert second["chosen"] == first["chosen"]
    found, wanted = torch.tensor(second["logits"]), torch.tensor(first["logits"])
    assert (found - wanted).abs().mean() <= 1e-5 * wanted.abs().mean()
    assert second["int4"] == first["int4"] != {}


def test_each_ran_on_its_own(reports):
    said = {n: str([report["log"] for report in each.values()]) for n, each in reports.items()}
    assert "Using V2 Model Runner" not in said[1]
    assert "Using V2 Model Runner" in said[2]


def test_weights_are_loaded_again_in_place(reports):
    assert reports[2]["eager"]["reload_keeps_every_byte"]
