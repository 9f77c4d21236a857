# SPDX-License-Identifier: Apache-2.0
"""A backend and a harness that answer at once, and note what they were asked."""

import sys
import types
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path

from vllm_nanoquant.evaluation.backend import Output, WindowScore


class FakeBackend:
    """A model that gives each token of window i the loss `loss + i / 10`, and hits every third."""

    def __init__(self, loss=2.0, context=100_000, name="fake"):
        self.loss, self.context, self.name = loss, context, name
        self.scored = []
        self.output = Output()

    def describe(self):
        return {"through": "fake", "model": self.name}

    def tokenize(self, text):
        return list(text.encode())

    def score(self, windows):
        for index, window in enumerate(windows):
            self.scored.append(window)
            tokens = len(window) - 1
            yield WindowScore((self.loss + index / 10) * tokens, tokens // 3, tokens)

    def harness_model(self, task):
        return "a model", self.output

    @contextmanager
    def tokenizer_folder(self):
        yield Path("the tokenizer")


class FakeHarness:
    """Stands for the package lm_eval; `scores` are each document's, by run and task."""

    def __init__(self, monkeypatch, scores, metric="exact_match", chosen="none", known=None):
        self.scores, self.key = scores, (metric, chosen)
        self.known = known or sorted(scores[0])
        self.calls, self.indices = [], []
        self.error = None
        self.output = None
        package, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
        package.__spec__ = ModuleSpec("lm_eval", None)
        package.simple_evaluate, package.tasks = self.simple_evaluate, tasks
        tasks.TaskManager = self.make_index
        monkeypatch.setitem(sys.modules, "lm_eval", package)
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)

    def make_index(self, **settings):
        self.indices.append(settings)
        return types.SimpleNamespace(all_tasks=self.known, **settings)

    def simple_evaluate(self, **asked):
        print("the harness prints")
        self.calls.append(asked)
        if self.error:
            raise self.error
        if self.output:
            self.output.add(100 * len(self.calls), "length" if len(self.calls) == 1 else "stop")
        metric, chosen = self.key
        documents = self.scores[len(self.calls) - 1]
        samples = {
            task: [
                {"doc_id": i, "filter": name, metric: value if name == chosen else 7.0}
                for name in ("another", chosen)
                for i, value in reversed(list(enumerate(values)))
            ]
            for task, values in documents.items()
        }
        results = {
            task: {f"{metric},{chosen}": sum(values) / len(values), "alias": task}
            for task, values in documents.items()
        }
        counts = {task: {"effective": len(values)} for task, values in documents.items()}
        return {
            "results": {"a group": {"alias": "x"}, **results},
            "samples": samples,
            "n-samples": counts,
        }
