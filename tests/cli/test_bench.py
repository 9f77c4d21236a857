# SPDX-License-Identifier: Apache-2.0
"""`nanoquant bench`, without a vLLM server: tests/serving/test_serve_command.py has a real one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from vllm_nanoquant.bench import decoding, kernel, plot
from vllm_nanoquant.bench.decoding import BenchmarkError, Load, client_arguments, summarise
from vllm_nanoquant.bench.layers import Layer, layers_of, parse_shape
from vllm_nanoquant.bench.server import ServedModel
from vllm_nanoquant.kernels.timing import Times

MODELS = [
    {"id": "first", "root": "/nowhere/first", "max_model_len": 512},
    {"id": "second", "root": "maker/second", "max_model_len": 2048},
]
RAW = {
    "duration": 4.0,
    "output_lens": [11, 11, 21],
    "ttfts": [0.1, 0.2, 0.3],
    "itls": [[0.5, 0.5], [0.1] * 10, [2.0]],
    "errors": ["", "", ""],
}


@pytest.fixture
def server():
    """A server that names its models as vLLM does."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            found = {"/v1/models": {"data": MODELS}, "/version": {"version": "0.32.0"}}
            allowed = self.headers["Authorization"] in (None, "Bearer right")
            self.send_response((200 if self.path in found else 404) if allowed else 401)
            self.end_headers()
            self.wfile.write(json.dumps(found.get(self.path, {})).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def client(monkeypatch):
    """vLLM's client: what it is given, and figures as it would find them."""
    given = []

    def run(arguments):
        given.extend(arguments)
        yield from (RAW for _ in arguments)

    monkeypatch.setattr(decoding, "_run_client", run)
    return given


def test_figures_of_one_concurrency():
    row = summarise(2, RAW)
    # 10 tokens in 1 s, 10 in 1 s, 20 in 2 s; 43 tokens in all.
    assert row["decode_tokens_per_second"] == {"p10": 10.0, "p50": 10.0, "p90": 10.0}
    assert (row["concurrency"], row["requests"], row["output_tokens"]) == (2, 3, 43)
    assert row["tokens_per_second"] == 10.75
    assert row["ms_to_first_token"] == {"p10": 120.0, "p50": 200.0, "p90": 280.0}
    slow = {**RAW, "itls": [[1.0], [2.0], [20.0]]}  # 10, 5 and 1 tokens/s
    assert summarise(1, slow)["decode_tokens_per_second"] == {"p10": 1.8, "p50": 5.0, "p90": 9.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"errors": ["", "Traceback\nRefused: no", ""]}, "1 of 3 requests failed: Refused: no"),
        ({"itls": [], "errors": [], "output_lens": []}, "0 of 0 requests failed: no answer"),
        ({"itls": [[0.5], [], [1.0]]}, "came in one piece.*--output-tokens"),
    ],
)
def test_requests_that_failed_are_no_figures(change, said):
    with pytest.raises(BenchmarkError, match=said):
        summarise(4, {**RAW, **change})


def test_what_the_client_is_asked_for():
    model = ServedModel("http://h:1", "name", "root", 512, None)
    two, three = client_arguments(model, "tok", Load((2, 3), 20, 3, 100, 128))
    pairs = dict(pairwise(two))
    assert pairs["--num-prompts"] == "40" and pairs["--num-warmups"] == "6"
    assert pairs["--max-concurrency"] == "2"
    assert (pairs["--random-input-len"], pairs["--random-output-len"]) == ("100", "128")
    assert "--ignore-eos" in two and pairs["--base-url"] == "http://h:1"
    assert two[two.index("--seed") + 1] != three[three.index("--seed") + 1]
    assert Load() == Load((1, 2, 4, 8), 20, 3, 128, 128)


def test_the_whole_command(run, server, client, tmp_path):
    file = tmp_path / "result.json"
    words = ["--base-url", server + "/v1/", "--model", "second", "--concurrency", "1,2"]
    status, out, err = run("bench", "serve", *words, "--output", file, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result == json.loads(file.read_text())
    assert [row["concurrency"] for row in result["results"]] == [1, 2]
    conditions = result["conditions"]
    assert (conditions["model"], conditions["server_vllm"]) == ("second", "0.32.0")
    assert (conditions["runs"], conditions["warm_ups"], conditions["prompt_tokens"]) == (20, 3, 128)
    assert conditions["device"]["cpu"] and conditions["client"]["vllm-nanoquant"]
    assert [words[words.index("--tokenizer") + 1] for words in client] == ["maker/second"] * 2
    status, out, err = run("bench", "serve", *words)
    assert (status, out.splitlines()[0].split()[:2]) == (0, ["at", "once"])
    assert "1 at once: 10.0 tokens/s each" in err


def test_what_is_refused_before_anything_is_measured(run, server, client, tmp_path):
    for words, said in (
        (["--base-url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9/v1/models"),
        (["--base-url", server + "/x"], "answers 404"),
        (["--base-url", server, "--model", "third"], "its models: first, second"),
        (["--base-url", server], "the tokenizer of first is not here"),
        (["--base-url", server, "--prompt-tokens", "385"], "make 513, and the server takes 512"),
        (["--output-tokens", "1", "--base-url", server], "needs 2 tokens or more"),
        (["--concurrency", "1,0"], "'0' is not a whole number"),
        (["--concurrency", "2,2"], "has a number twice"),
        (["--output", tmp_path / "no" / "file"], "there is no folder"),
    ):
        status, out, err = run("bench", "serve", *words)
        assert (status, out) == (2, ""), words
        assert said in err and err.count("\n") == 1, (words, err)
    assert client == []


def test_a_server_with_a_key(run, server, client, monkeypatch):
    words = ["--base-url", server, "--model", "second"]
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert run("bench", "serve", *words)[0] == 0
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    status, _, err = run("bench", "serve", *words)
    assert (status, "answers 401" in err and "OPENAI_API_KEY" in err) == (2, True)


def test_a_failure_writes_nothing(run, server, monkeypatch, tmp_path):
    def run_client(arguments):
        yield RAW
        yield {**RAW, "errors": ["gone"] * 3}

    monkeypatch.setattr(decoding, "_run_client", run_client)
    file = tmp_path / "result.json"
    words = ["--base-url", server, "--tokenizer", "x", "--concurrency", "1,2", "--output", file]
    status, _, err = run("bench", "serve", *words)
    assert (status, file.exists()) == (1, False)
    assert "concurrency 2: 3 of 3 requests failed: gone" in err


def test_a_client_that_dies_is_an_error_with_its_last_words(monkeypatch):
    monkeypatch.setattr(decoding, "_CLIENT", "no_such_module")
    with pytest.raises(BenchmarkError, match=r"status 1: .*no_such_module"):
        list(decoding._run_client([["x"]]))


def test_the_plot_and_what_it_needs(run, server, client, monkeypatch, tmp_path):
    file = tmp_path / "plot.svg"
    words = ["--base-url", server, "--model", "second", "--concurrency", "1,4", "--plot", file]
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    status, _, err = run("bench", "serve", *words)
    assert (status, file.exists()) == (0, False)
    assert "pip install 'vllm-nanoquant[bench]'" in err
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "_run_client", lambda arguments: [RAW] * len(arguments))
    pytest.importorskip("matplotlib")
    status, _, err = run("bench", "serve", *words)
    assert status == 0, err
    assert file.read_text().startswith("<?xml")
    status, _, err = run("bench", "serve", *words[:-1], tmp_path / "plot.xyz")
    assert (status, ".svg, .png or .pdf" in err) == (2, True)


# The kernels


def test_shapes():
    assert parse_shape("2832x4480") == Layer("2832x4480", 2832, 4480)
    for wrong in ("2832", "x", "0x128", "-1x2", "2832x4480x1", "1e3x128"):
        with pytest.raises(ValueError, match="NxK"):
            parse_shape(wrong)


def test_layers_of_a_model(tiny_model):
    found = {(each.name, each.n, each.k): each.count for each in layers_of(str(tiny_model))}
    assert found == {
        ("in_proj", 1288, 288): 3,
        ("out_proj", 288, 512): 3,
        ("up_proj", 672, 288): 3,
        ("down_proj", 288, 672): 3,
        ("qkv_proj", 512, 288): 1,
        ("o_proj", 288, 256): 1,
        ("lm_head", 1801, 288): 1,
    }


def test_layers_that_cannot_be_joined_stand_alone(tmp_path):
    weights = {
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(8, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(6, 4),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 4),
        "model.norm.weight": torch.zeros(4),
    }
    save_file(weights, tmp_path / "model.safetensors")
    found = {(each.name, each.n, each.k) for each in layers_of(str(tmp_path))}
    assert found == {("gate_up_proj", 16, 4), ("q_proj", 6, 4)}


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_each_time_has_its_error(group_size):
    calls = []

    def timer(given, replays):
        calls.append((len(given), replays, given[0]().shape))
        return Times(3.0, 2.0, 5.0)

    layer, device = Layer("odd", 72, 136), torch.device("cpu")
    rows = list(kernel.measure_layer(layer, (1, 5), group_size, 7, device, timer))
    assert [(row.tokens, row.contestant) for row in rows] == [
        (1, "ours"), (1, "bf16"), (5, "ours"), (5, "bf16"),
    ]  # fmt: skip
    assert calls == [(1, 7, (tokens, 72)) for tokens in (1, 1, 5, 5)]
    for row in rows:
        assert (row.n, row.k, row.us, row.us_least, row.us_greatest) == (72, 136, 3.0, 2.0, 5.0)
        assert 2e-4 < row.error < 4e-3  # bf16's rounding of the result alone
    # Of random weights int4 keeps a tenth; the BF16 product has no such error.
    assert all(0.03 < row.int4_error < 0.2 for row in rows if row.contestant == "ours")
    assert all(row.int4_error is None for row in rows if row.contestant == "bf16")


def test_the_clock_and_the_error():
    ticks = []
    times = kernel.time_by_clock([lambda: ticks.append(1), lambda: ticks.append(2)], 3)
    assert ticks == [1, 2] * 4  # once to warm up
    assert 0 < times.least <= times.median <= times.greatest < 1e6
    x, exact = torch.ones(600, 4), torch.ones(2, 4, dtype=torch.float64)
    y = torch.full((600, 2), 4.0)
    assert kernel.relative_error(y, x, exact) == 0
    y[599, 1] = 10.0  # 6 too much, of 4800 in all
    assert kernel.relative_error(y, x, exact) == pytest.approx(6 / 4800)
    y[0, 0] = torch.nan
    assert not kernel.relative_error(y, x, exact) < 1


def test_the_whole_kernel_command(run, tmp_path):
    file = tmp_path / "kernels.json"
    words = ["--shape", "64x128", "--tokens", "1,2", "--replays", "2", "--device", "cpu"]
    status, out, err = run("bench", "kernel", *words, "--output", file)
    assert status == 0, err
    assert "times say nothing about a kernel" in " ".join(err.split())
    result = json.loads(file.read_text())
    assert "plain torch" in result["conditions"]["note"]
    assert len(result["results"]) == 4 == len(out.splitlines()) - 1
    assert all(row["us"] > 0 and row["error"] < 4e-3 for row in result["results"])


def test_wrong_usage_of_the_kernel_command(run, tiny_model, tmp_path):
    for words, said in (
        (["--shape", "64"], "is not a shape NxK"),
        (["--shape", "64x64", "--model", tiny_model], "give one of them"),
        (["--model", tmp_path], "has no BF16 weight"),
        (["--model", tmp_path / "no"], "is not a folder"),
        (["--device", "cuda:99"], "has no such device"),
        (["--group-size", "48"], "invalid choice: 48"),
        (["--tokens", "0"], "'0' is not a whole number"),
    ):
        status, out, err = run("bench", "kernel", *words)
        assert (status, out) == (2, ""), words
        assert said in err, (words, err)
    status, out, _ = run("bench", "kernel", "--help")
    assert (status, "examples:\n  nanoquant bench kernel" in out) == (0, True)
