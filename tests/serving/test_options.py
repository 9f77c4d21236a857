# SPDX-License-Identifier: Apache-2.0
"""Every way by which options reach the recipe, through real vLLM."""

import json
import shutil
import socket
import sys

import pytest
from _server import Server

from .engines import METHOD, job, run_engines

pytestmark = [pytest.mark.compat, pytest.mark.slow]

FLAG = "--hf-overrides.quantization_config"
RECIPE = {"preset": "ssm", "group_size": 64, "ignore": ["backbone.layers.0.mixer.in_proj"]}
SAYS = "quantized 5 modules to int4 (preset ssm, group size 64, mse)"


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    in_file = folder / "recipe.json"
    in_file.write_text(json.dumps(RECIPE))
    with_config = folder / "model"
    shutil.copytree(tiny_model, with_config)
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": METHOD, **RECIPE}
    (with_config / "config.json").write_text(json.dumps(config))

    def overrides(**values):
        return {"hf_overrides": values}

    jobs = [
        job("config.json", with_config),
        job("overrides", tiny_model, RECIPE),
        job("file", tiny_model, {}, engine=overrides(quantization_config_file=str(in_file))),
        job("text", tiny_model, {}, engine=overrides(
            quantization_config_dict_json=json.dumps(RECIPE)
        )),
        job("method in overrides", tiny_model, engine=overrides(
            quantization_config={"quant_method": METHOD, **RECIPE}
        )),
        job("vLLM names", tiny_model, {
            **RECIPE,
            "ignore": [],
            "overrides": {"re:backbone\\.layers\\.0\\..*in_proj": {"bits": 16}},
        }),
    ]  # fmt: skip
    return run_engines(jobs, folder)


@pytest.mark.parametrize(
    "way", ["config.json", "overrides", "file", "text", "method in overrides", "vLLM names"]
)
def test_options_reach_the_recipe(reports, way):
    assert "error" not in reports[way], reports[way]
    assert sum(SAYS in line for line in reports[way]["log"]) == 1
    assert "model.layers.0.mixer.in_proj.weight_packed" not in reports[way]["int4"]
    assert reports[way]["tokens"] == reports["overrides"]["tokens"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tiny_model, tmp_path):
    """A vLLM API server on the shipped model, by the command line; yields its URL and its log."""
    port, log = free_port(), tmp_path / "server.log"
    arguments = ["--model", str(tiny_model), "--port", str(port), "--host", "127.0.0.1"]
    arguments += ["--served-model-name", "tiny", "--max-model-len", "512", "--max-num-seqs", "8"]
    arguments += ["--quantization", METHOD, f"{FLAG}.preset", "full", f"{FLAG}.group_size", "64"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    url = f"http://127.0.0.1:{port}"
    with Server(command, log, f"{url}/health") as server:
        server.wait("starting vLLM", 300)
        yield url, log


def test_a_server_takes_options_on_its_command_line_and_answers(server):
    from openai import OpenAI

    url, log = server
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answers = [
        client.completions.create(model="tiny", prompt="She was", max_tokens=16, temperature=0)
        for _ in range(2)
    ]
    assert answers[0].usage.completion_tokens == 16
    assert answers[0].choices[0].text.strip()
    assert answers[0].choices[0].text == answers[1].choices[0].text
    text = log.read_text()
    assert "quantized 15 modules to int4 (preset full, group size 64, mse)" in text
