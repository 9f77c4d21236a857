# SPDX-License-Identifier: Apache-2.0
"""The dashboard is valid, and asks Prometheus for what vLLM really exports."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import promql_parser
import pytest

from .files import DOCKER

DASHBOARD = json.loads((DOCKER / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}

_SCRAPED = {"instance", "job"}
"""Labels that Prometheus gives to whatever it reads."""
_CHILDREN = ("lhs", "rhs", "expr", "param", "args", "vector_selector")

ASKED_FOR = {
    "time to first token": "vllm:time_to_first_token_seconds_bucket",
    "inter-token latency": "vllm:inter_token_latency_seconds_bucket",
    "tokens per second": "vllm:generation_tokens_total",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "KV cache": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "prefix cache": "vllm:prefix_cache_hits_total",
    "speculative decoding": "vllm:spec_decode_num_accepted_tokens_total",
    "errors": "vllm:request_success_total",
    "errors over HTTP": "http_requests_total",
}


@dataclass(frozen=True)
class Selector:
    """One metric in a query."""

    metric: str
    matchers: tuple[tuple[str, str], ...]
    """Labels and the values that are wanted."""
    grouped: frozenset[str]
    """Labels that the aggregations around it keep."""


def plain(query: str) -> str:
    """A query as Prometheus gets it, with values in the place of Grafana's variables."""
    values = {"__rate_interval": "1m", "model": ".*", "instance": ".*"}
    return re.sub(r"\$(\w+)", lambda name: values[name.group(1)], query)


def nodes(node, grouped: frozenset[str] = frozenset()) -> Iterator[tuple]:
    """Every part of a parsed query, with the labels that aggregations around it keep."""
    yield node, grouped
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
        assert modifier.type == promql_parser.AggModifierType.By
        grouped = grouped | frozenset(modifier.labels)
    for name in _CHILDREN:
        child = getattr(node, name, None)
        for each in child if isinstance(child, list) else [child]:
            if each is not None:
                yield from nodes(each, grouped)


def selectors(query: str) -> list[Selector]:
    """The metrics of a query."""
    return [
        Selector(node.name, tuple((m.name, m.value) for m in node.matchers.matchers), grouped)
        for node, grouped in nodes(promql_parser.parse(plain(query)))
        if isinstance(node, promql_parser.VectorSelector)
    ]


def panel_queries() -> list[str]:
    """Every query of a panel."""
    return [target["expr"] for panel in PANELS.values() for target in panel["targets"]]


def variable_selectors() -> list[Selector]:
    """What the variables that ask Prometheus ask for; the label that they list counts as kept."""
    asked = [v["query"]["query"] for v in VARIABLES.values() if v["type"] == "query"]
    split = [re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups() for query in asked]
    return [
        replace(selector, grouped=frozenset({label}))
        for query, label in split
        for selector in selectors(query)
    ]


@cache
def exported() -> dict[str, dict[str, list[str]]]:
    """Series of the vLLM here, with their labels and values."""
    here = Path(__file__).parent
    command = [
        sys.executable,
        here / "exported_metrics.py",
        here.parents[1] / "models/tiny-nemotron-h",
    ]
    environment = dict(os.environ, VLLM_LOGGING_LEVEL="ERROR")
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr[-3000:]
    return json.loads(output.stdout.splitlines()[-1])


def test_grafana_knows_every_key():
    """Read and written again by Grafana's own library, nothing is lost or changed."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def kept(was, is_now, place: str) -> None:
        """Whether all of `was` is in `is_now`, which may have defaults beside it."""
        if isinstance(was, dict):
            for key, value in was.items():
                assert key in is_now, f"{place}.{key}"
                kept(value, is_now[key], f"{place}.{key}")
        elif isinstance(was, list):
            assert len(was) == len(is_now), place
            for number, (before, after) in enumerate(zip(was, is_now, strict=True)):
                kept(before, after, f"{place}[{number}]")
        else:
            assert was == is_now, place

    register_default_plugins()
    written = JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD))
    kept(DASHBOARD, json.loads(written), "dashboard")


def test_whatever_asks_prometheus_asks_the_chosen_one():
    assert VARIABLES["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS.values():
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [
            chosen
        ] * (1 + len(panel["targets"]))
    assert all(v["datasource"] == chosen for v in VARIABLES.values() if v["type"] == "query")


def test_panels_have_places_and_names_of_their_own():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(PANELS) == len([panel for panel in panels if panel["type"] != "row"])
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"].endswith(".")


def test_what_was_asked_for_is_shown():
    shown = {selector.metric for query in panel_queries() for selector in selectors(query)}
    assert {what for what, metric in ASKED_FOR.items() if metric not in shown} == set()


@pytest.mark.parametrize("query", panel_queries())
def test_a_query_means_something(query):
    """What a parser of PromQL alone does not see."""
    for node, _ in nodes(promql_parser.parse(plain(query))):
        if isinstance(node, promql_parser.Call) and node.func.name == "histogram_quantile":
            assert "le" in node.args[1].modifier.labels
        if isinstance(node, promql_parser.Call) and node.func.name == "rate":
            metric = node.args[0].vector_selector.name
            assert metric.endswith(("_total", "_bucket", "_sum", "_count")), f"{metric}: no counter"
    for selector in selectors(query):
        wanted = dict(selector.matchers)
        assert wanted["instance"] == ".*"
        assert selector.metric == "http_requests_total" or wanted["model_name"] == ".*"


@pytest.mark.compat
@pytest.mark.slow
def test_vllm_exports_every_metric_and_label():
    known = exported()
    asked = [selector for query in panel_queries() for selector in selectors(query)]
    asked += variable_selectors()
    for selector in asked:
        assert selector.metric in known, selector.metric
        labels = known[selector.metric]
        assert selector.grouped <= labels.keys() | _SCRAPED, selector
        for label, value in selector.matchers:
            assert label in labels.keys() | _SCRAPED, selector
            assert value == ".*" or value in labels[label], selector
