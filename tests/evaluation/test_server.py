# SPDX-License-Identifier: Apache-2.0
"""A server as vLLM answers, in this process: what is asked of it, and answers that are none."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.server import Server

CARD = {"id": "tiny", "root": "maker/tiny", "max_model_len": 512}


def places(window):
    """Token t has probability 1 / (t + 2); even ones are the likeliest."""
    rest = [
        {
            str(t): {"logprob": -math.log(t + 2), "rank": 1 + t % 2},
            "7000": {"logprob": 0, "rank": 9},
        }
        for t in window[1:]
    ]
    return [None, *rest]


class Fake:
    """Answers by path; notes what it was asked."""

    def __init__(self):
        self.asked, self.headers = [], []
        self.answers = {
            "/v1/models": lambda body: {"data": [CARD]},
            "/version": lambda body: {"version": "0.32.0"},
            "/tokenize": lambda body: {"tokens": list(body["prompt"].encode())},
            "/v1/completions": lambda body: {
                "choices": [{"prompt_logprobs": places(body["prompt"])}]
            },
        }


@pytest.fixture
def fake():
    served = Fake()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            served.asked.append((self.path, body))
            served.headers.append(self.headers.get("Authorization"))
            answer = served.answers.get(self.path)
            content = b"nothing here" if answer is None else answer(body)
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        served.url = f"http://127.0.0.1:{http.server_address[1]}"
        yield served
        http.shutdown()


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_what_it_says_of_itself(fake, end):
    server = Server(fake.url + end, None, None, 2)
    assert server.describe() == {
        "through": "server",
        "model": "tiny",
        "path": "maker/tiny",
        "max_model_len": 512,
        "server_vllm": "0.32.0",
    }
    assert server.tokenizer == "maker/tiny"
    assert Server(fake.url, "tiny", "elsewhere", 2).tokenizer == "elsewhere"
    assert fake.headers[0] is None


def test_windows_are_scored_in_order(fake, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = Server(fake.url, None, None, 3)
    windows = [[5, i, 2 * i, 11] for i in range(12)]
    scores = list(server.score(windows))
    assert [score.tokens for score in scores] == [3] * 12
    for (_, *rest), score in zip(windows, scores, strict=True):
        assert score.loss == pytest.approx(sum(math.log(t + 2) for t in rest))
        assert score.hits == sum(t % 2 == 0 for t in rest)
    path, body = fake.asked[-1]
    assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "tiny", 1)
    assert body["prompt_logprobs"] == 0
    assert set(fake.headers) == {"Bearer secret"}
    assert server.tokenize("ab") == [97, 98]
    assert fake.asked[-1][1]["add_special_tokens"] is False


def test_several_models(fake):
    fake.answers["/v1/models"] = lambda body: {"data": [CARD, {**CARD, "id": "lora"}]}
    with pytest.raises(SuiteError, match="serves tiny, lora; choose one with --served-model"):
        Server(fake.url, None, None, 1)
    assert Server(fake.url, "lora", None, 1).model == "lora"
    with pytest.raises(SuiteError, match="serves tiny, lora, not big"):
        Server(fake.url, "big", None, 1)


def test_no_address_and_nobody_there():
    for url in ("localhost:8000", "file:///etc/passwd", ""):
        with pytest.raises(SuiteError, match="is no address; give one as in http"):
            Server(url, None, None, 1)
    with pytest.raises(EvaluationError, match=r"does not answer .*; is the server up\?"):
        Server("http://127.0.0.1:9", None, None, 1)


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/v1/models", b"<html>", "did not answer with JSON"),
        ("/v1/models", [], "did not answer with a JSON object"),
        ("/v1/models", {"data": []}, "lists no model"),
        ("/v1/models", {"data": [{"id": "x"}]}, "does not say how long a prompt may be"),
        ("/tokenize", {}, "gave no tokens"),
        ("/v1/completions", {"choices": []}, "gave no prompt_logprobs"),
        ("/v1/completions", {"choices": [{"prompt_logprobs": None}]}, "gave no prompt_logprobs"),
        ("/v1/completions", {"choices": [{"prompt_logprobs": [None]}]}, "gave no prompt_logprobs"),
    ],
)
def test_answers_that_are_not_vllms(fake, path, answer, said):
    fake.answers[path] = lambda body: answer
    with pytest.raises(EvaluationError, match=said):
        server = Server(fake.url, None, None, 1)
        assert server.context
        server.tokenize("a")
        list(server.score([[1, 2, 3]]))


def test_a_refusal_is_told_with_the_servers_words(fake):
    del fake.answers["/tokenize"], fake.answers["/version"]
    server = Server(fake.url, None, None, 1)
    assert server.describe()["server_vllm"] is None
    with pytest.raises(EvaluationError, match="/tokenize answered 404: nothing here"):
        server.tokenize("a")
