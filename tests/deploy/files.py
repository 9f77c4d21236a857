# SPDX-License-Identifier: Apache-2.0
"""The files in docker/, read: what each way of deploying starts, and with what."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE = ("compose.3090.yml", "compose.2x3090.yml", "compose.a10g.yml")
CLUSTERS = ("kserve", "openshift")

_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")


@dataclass(frozen=True)
class Deployment:
    """What one way of deploying gives to `vllm serve`, and around it."""

    name: str
    arguments: list[str]
    gpus: int
    port: int
    """Where it is asked whether it is healthy."""


def instruction(name: str) -> str:
    """The last instruction in the Dockerfile that begins so; the rest of it, on one line."""
    joined = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(rf"^{name}\b(.*)$", joined, re.MULTILINE)[-1].strip()


def image_environment() -> dict[str, str]:
    """What the Dockerfile's ENV sets."""
    return dict(pair.split("=", 1) for pair in instruction("ENV").split())


def compose(name: str) -> dict:
    """A compose file with defaults in the place of variables."""
    text = (DOCKER / name).read_text(encoding="utf-8")
    return yaml.safe_load(_VARIABLE.sub(r"\1", text))


def common() -> dict:
    """The service that every compose file extends."""
    return compose("compose.common.yml")["services"]["vllm"]


def health_check() -> list[str]:
    """The command of the compose files' health check, without CMD."""
    return common()["healthcheck"]["test"][1:]


def resource(cluster: str, name: str) -> dict:
    """One of the resources for a cluster."""
    return yaml.safe_load((DOCKER / cluster / f"{name}.yaml").read_text(encoding="utf-8"))


def container(cluster: str) -> dict:
    """The container of a cluster's runtime."""
    (only,) = resource(cluster, "serving-runtime")["spec"]["containers"]
    return only


def deployments() -> list[Deployment]:
    """Every one of them."""
    asked = int(re.search(r"127\.0\.0\.1:(\d+)", health_check()[-1]).group(1))
    found = [Deployment("Dockerfile", json.loads(instruction("CMD")), 1, asked)]
    for name in COMPOSE:
        service = compose(name)["services"]["vllm"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        found.append(Deployment(name, service["command"], device["count"], asked))
    for cluster in CLUSTERS:
        runs = container(cluster)
        asks = resource(cluster, "inference-service")["spec"]["predictor"]["model"]
        arguments = [text.replace("{{.Name}}", "name") for text in runs["args"] + asks["args"]]
        gpus = int(runs["resources"]["limits"]["nvidia.com/gpu"])
        port = runs["readinessProbe"]["httpGet"]["port"]
        found.append(Deployment(cluster, arguments, gpus, port))
    return found
