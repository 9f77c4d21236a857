# SPDX-License-Identifier: Apache-2.0
"""The image and the compose files agree with each other, with the package and with themselves."""

import importlib.metadata
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import PurePosixPath

import pytest
from packaging.version import Version

from vllm_nanoquant.requirements import MAX_VLLM, MIN_VLLM

from .files import (
    COMPOSE,
    DOCKER,
    DOCKERFILE,
    ROOT,
    common,
    compose,
    health_check,
    image_environment,
    instruction,
)

DEFAULT = re.search(r"^ARG VLLM_VERSION=v(\S+)$", DOCKERFILE.read_text(), re.MULTILINE).group(1)


def test_one_default_version_everywhere():
    assert MIN_VLLM <= Version(DEFAULT) < MAX_VLLM
    assert common()["image"] == f"vllm-nanoquant:v{DEFAULT}"
    assert common()["build"]["args"]["VLLM_VERSION"] == f"v{DEFAULT}"
    for path in DOCKER.glob("*/serving-runtime.yaml"):
        tags = re.findall(r"vllm-nanoquant:v(\S+)|runtime-version: v(\S+)", path.read_text())
        assert tags and {tag for pair in tags for tag in pair if tag} == {DEFAULT}


@pytest.mark.parametrize(
    "version, fits",
    [("0.25.1", False), ("0.26.0", True), ("0.33.9+cu129", True), ("0.34.0", False)],
)
def test_another_vllm_ends_the_build(version, fits, monkeypatch):
    """The Python in the Dockerfile, run on what an image might hold."""
    (code,) = re.findall(r'python3 -c "(.*?)"', instruction("RUN --mount=type=bind"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"vllm": version}[name])
    if fits:
        exec(code, {})
    else:
        with pytest.raises(AssertionError, match=re.escape(version)):
            exec(code, {})


def test_only_what_is_copied_is_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert "*" in ignored
    assert sent == set(" ".join(copied).split())
    assert all((ROOT / name).exists() for name in sent)


def test_caches_outlive_the_container():
    """What vLLM, Triton and the Hub keep lies in a volume, at a place the image gives its user."""
    home = PurePosixPath(image_environment()["HOME"])
    volumes = dict(volume.split(":") for volume in common()["volumes"])
    assert volumes == {
        "huggingface": str(home / ".cache" / "huggingface"),
        "compiled": str(home / ".cache"),
    }
    assert image_environment()["TRITON_CACHE_DIR"].startswith(volumes["compiled"] + "/")
    made = instruction("RUN install").split()
    assert set(volumes.values()) <= set(made)
    assert instruction("USER") == "2000:0"


@pytest.mark.parametrize("name", COMPOSE)
def test_each_compose_file_is_complete(name):
    file = compose(name)
    service = file["services"]["vllm"]
    assert service["extends"] == {"file": "compose.common.yml", "service": "vllm"}
    assert set(file["volumes"]) == {volume.split(":")[0] for volume in common()["volumes"]}
    assert f"-f docker/{name} " in (DOCKER / name).read_text()
    assert common()["build"] | {"args": {}} == {
        "context": "..",
        "dockerfile": "docker/Dockerfile",
        "args": {},
    }


class _Answer(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status, healthy", [(200, True), (503, False), (None, False)])
def test_health_check_tells_what_vllm_answers(status, healthy, monkeypatch):
    """The command itself, on another port; None is a server that does not listen."""
    monkeypatch.setattr(_Answer, "status", status)
    with HTTPServer(("127.0.0.1", 0), _Answer) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if status is None:
            server.shutdown()
            server.server_close()
        code = health_check()[-1].replace(":8000/", f":{port}/")
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
        server.shutdown()
    assert (tried.returncode == 0) is healthy


def test_the_image_checks_its_health_the_same_way():
    text = re.findall(r"^HEALTHCHECK .*CMD (.*)$", DOCKERFILE.read_text().replace("\\\n", ""), re.M)
    assert json.loads(text[0]) == health_check()


def test_published_on_this_machine_alone():
    assert common()["ports"] == ["127.0.0.1:8000:8000"]
