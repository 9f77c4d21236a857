# SPDX-License-Identifier: Apache-2.0
"""`nanoquant serve` and `nanoquant bench serve`: one real server, and the openai client."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from _server import Server

from .test_tool_server import ARGUMENTS, CALLS, TOOLS

pytestmark = pytest.mark.slow

TEMPLATE = Path(__file__).with_name("nemotron_v2.jinja")
NANOQUANT = [sys.executable, "-m", "vllm_nanoquant"]
LONG = "It was a fine day. " * 80  # more tokens than a block of vLLM's cache has


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("serve")
    template = folder / "template.jinja"
    template.write_text("{#- writes <TOOLCALL>[...]</TOOLCALL> -#}\n" + TEMPLATE.read_text())
    config = folder / "vllm.yaml"
    config.write_text(f"port: {port}\nhost: 127.0.0.1\nmax-num-seqs: 4\nenforce-eager: true\n")
    words = ["serve", str(tiny_model), "--preset", "full", "--max_model_len=1k", "--config"]
    words += [str(config), "--served-model-name", "tiny", "--chat-template", str(template)]
    log = folder / "server.log"
    with Server([*NANOQUANT, *words], log, f"http://127.0.0.1:{port}/health") as server:
        server.wait("starting vLLM", 300)
        server.url = f"http://127.0.0.1:{port}"
        yield server


@pytest.fixture(scope="module")
def client(server):
    from openai import DefaultHttpxClient, OpenAI

    http = DefaultHttpxClient(trust_env=False)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client:
        yield client


def test_the_line_is_printed_and_the_process_is_vllm(server, tiny_model):
    log = server.log.read_text()
    printed = next(line for line in log.splitlines() if f" {tiny_model} " in line)
    words = shlex.split(printed)
    running = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")[:-1]
    # A script's own interpreter stands before it, and the first word may have got a folder.
    assert running[-len(words) + 1 :] == words[1:]
    flags = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    assert len(set(flags)) == len(flags)
    assert re.search(r"nanoquant_w4a16: quantized \d+ modules to int4 \(preset full", log)
    assert "Found duplicate keys" not in log


def test_a_chat_with_a_tool_call(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "How is the weather? /no_think"}],
        tools=TOOLS,
        max_tokens=300,
        temperature=0,
        extra_body={"structured_outputs": {"regex": re.escape("So.\n" + CALLS)}},
    ).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]
    assert (calls, answer.message.content.strip()) == (ARGUMENTS, "So.")
    assert answer.finish_reason == "tool_calls"


def test_a_chat_that_thinks(client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello? /think"}], max_tokens=8
    )
    assert answer.choices[0].message.reasoning and not answer.choices[0].message.content


def test_a_long_prompt(client):
    answer = client.completions.create(model="tiny", prompt=LONG, max_tokens=4)
    assert answer.usage.prompt_tokens > 400 and answer.usage.completion_tokens == 4


def test_bench_serve(server, tmp_path):
    file = tmp_path / "result.json"
    words = ["bench", "serve", "--base-url", server.url, "--runs", "3", "--warm-ups", "1"]
    words += ["--concurrency", "1,2", "--prompt-tokens", "16", "--output-tokens", "32"]
    done = subprocess.run(
        [*NANOQUANT, *words, "--output", str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert [row["concurrency"] for row in result["results"]] == [1, 2]
    assert [row["requests"] for row in result["results"]] == [3, 6]
    assert [row["output_tokens"] for row in result["results"]] == [96, 192]
    for row in result["results"]:
        speed = row["decode_tokens_per_second"]
        assert 0 < speed["p10"] <= speed["p50"] <= speed["p90"]
        # What all requests make together, prompts included, is not above what each decodes.
        assert 0 < row["tokens_per_second"] < 1.2 * row["concurrency"] * speed["p90"]
    conditions = result["conditions"]
    assert (conditions["model"], conditions["max_model_len"]) == ("tiny", 1000)
    installed = {version.partition("+")[0] for version in conditions["client"].values()}
    assert conditions["server_vllm"].partition("+")[0] in installed
