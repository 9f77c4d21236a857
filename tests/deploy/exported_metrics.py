# SPDX-License-Identifier: Apache-2.0
"""Print what the vLLM of this environment exports at /metrics, as JSON, without loading a model.

vLLM's own logger and its own HTTP metrics register their metrics as they do in a server, with the
shipped model's configuration; speculative decoding is on, because without it its metrics are not
there. A process of its own: the registry of metrics is the process's.

    python exported_metrics.py MODEL
"""

import json
import sys
from importlib import import_module

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import PrometheusStatLogger


def page(model: str) -> str:
    """The text of /metrics after one request over HTTP that found nothing."""
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    arguments = EngineArgs(model=model, max_model_len=256, speculative_config=speculation)
    PrometheusStatLogger(arguments.create_engine_config(), engine_indexes=[0])
    app = FastAPI()
    import_module("vllm.entrypoints.serve.instrumentator.metrics").attach_router(app)
    with TestClient(app) as client:
        client.get("/nothing-here")
        return client.get("/metrics").text


def main() -> None:
    """Print {name of a series: {label: [values]}}."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(page(sys.argv[1])):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    listed = {name: {k: sorted(v) for k, v in labels.items()} for name, labels in found.items()}
    print(json.dumps(listed))


if __name__ == "__main__":
    main()
