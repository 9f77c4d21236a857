# SPDX-License-Identifier: Apache-2.0
"""Resources for KServe and OpenShift: the schemas do check, and a restricted pod can run them."""

import copy
import json
from pathlib import Path, PurePosixPath

import pytest
from jsonschema import Draft202012Validator

from .files import CLUSTERS, container, image_environment, resource

SCHEMAS = Path(__file__).with_name("schemas")


def accepted(resource: dict, kind: str) -> bool:
    """Whether KServe's schema accepts it, by what `make lint-deploy` uses underneath."""
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema).is_valid(resource)


def test_schemas_refuse_what_kserve_would():
    runtime = resource("kserve", "serving-runtime")
    service = resource("kserve", "inference-service")

    def broken(whole, path, key, value):
        changed = copy.deepcopy(whole)
        place = changed
        for step in path:
            place = place[step]
        place[key] = value
        return changed

    box = ["spec", "containers", 0]
    model = ["spec", "predictor", "model"]
    cases = [
        ("ServingRuntime", runtime, True),
        ("ServingRuntime", broken(runtime, box, "livelinessProbe", {}), False),
        ("ServingRuntime", broken(runtime, [*box, "startupProbe"], "periodSeconds", "x"), False),
        ("ServingRuntime", broken(runtime, [*box, "env", 0], "value", 1), False),
        ("ServingRuntime", broken(runtime, ["spec"], "securityContext", {}), False),
        ("ServingRuntime", broken(runtime, [], "apiVersion", "serving.kserve.io/v1beta1"), False),
        ("InferenceService", service, True),
        ("InferenceService", broken(service, model, "storageURI", "hf://a/b"), False),
        ("InferenceService", broken(service, model, "args", "--a --b"), False),
        ("InferenceService", broken(service, ["spec"], "predictors", {}), False),
        ("InferenceService", broken(service, ["spec", "predictor"], "minReplicas", "1"), False),
    ]
    for number, (kind, content, right) in enumerate(cases):
        assert accepted(content, kind) is right, f"case {number}"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_runtime_and_service_fit_together(cluster):
    runtime = resource(cluster, "serving-runtime")
    model = resource(cluster, "inference-service")["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [known["name"] for known in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats
    port = container(cluster)["ports"][0]["containerPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(cluster)[probe]["httpGet"] == {"path": "/health", "port": port}
    for prefix in ("prometheus.io", "prometheus.kserve.io"):
        assert runtime["spec"]["annotations"][f"{prefix}/port"] == str(port)
        assert runtime["spec"]["annotations"][f"{prefix}/path"] == "/metrics"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_restricted_pods_may_run_it(cluster):
    """What the restricted pod security standard and OpenShift's restricted-v2 admit."""
    assert container(cluster)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,  # and no runAsUser: OpenShift chooses the id
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    volumes = resource(cluster, "serving-runtime")["spec"]["volumes"]
    assert all(set(volume) == {"name", "emptyDir"} for volume in volumes)
    limits = container(cluster)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == container(cluster)["resources"]["requests"]["nvidia.com/gpu"]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_everything_written_lies_in_a_volume(cluster):
    mounts = [PurePosixPath(mount["mountPath"]) for mount in container(cluster)["volumeMounts"]]
    home = PurePosixPath(image_environment()["HOME"])
    triton = PurePosixPath(image_environment()["TRITON_CACHE_DIR"])
    for written in (
        home / ".cache" / "vllm",
        triton,
        PurePosixPath("/tmp"),
        PurePosixPath("/dev/shm"),
    ):
        assert any(written.is_relative_to(mount) for mount in mounts), written
    named = {volume["name"] for volume in resource(cluster, "serving-runtime")["spec"]["volumes"]}
    assert {mount["name"] for mount in container(cluster)["volumeMounts"]} == named


def test_openshift_runs_the_same():
    """Its files differ in names of the image, labels, annotations and tolerations alone."""
    for name in ("serving-runtime", "inference-service"):
        ours, theirs = (resource(cluster, name)["spec"] for cluster in CLUSTERS)
        for spec in (ours, theirs):
            spec.pop("annotations", None)
            spec.get("predictor", {}).pop("tolerations", None)
            for box in spec.get("containers", []):
                box["image"] = box["image"].rsplit("/", 1)[1]
        assert ours == theirs
