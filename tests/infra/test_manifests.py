"""The KubeRay manifests against the schema of what they use; with KUBERAY_CRD=<file>, against the operator's own.

kuberay_schema.json describes the fields of a RayJob that infra/kuberay uses, as ray.io/v1 documents them, and refuses
any other, so that a misspelt field fails here and not silently on a cluster. It was written for this test; the
operator's definition (ray-operator/config/crd/bases/ray.io_rayjobs.yaml of its repository, 1.4 MB) is not shipped.
"""

import copy
import functools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from musicgen import settings
from pipelines import ingest
from training.config import read_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kuberay"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def strict(schema: Any) -> Any:
    """A Kubernetes schema that refuses unknown fields, as the API server does under strict validation."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    made = {key: strict(part) for key, part in schema.items() if key not in ("format", "default")}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def checks() -> list[Any]:
    found = [json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())]
    if os.environ.get("KUBERAY_CRD"):
        crd = yaml.load(Path(os.environ["KUBERAY_CRD"]).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        v1 = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
        v1["properties"]["metadata"] = {"type": "object"}
        found.append(strict(v1))
    return [jsonschema.Draft202012Validator(schema) for schema in found]


def problems(document: dict[str, Any]) -> list[str]:
    return [error.message for check in checks() for error in check.iter_errors(document)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_a_manifest_fits_the_schema(path: Path) -> None:
    assert problems(read(path)) == []


def test_the_schema_finds_what_is_wrong() -> None:
    good = read(FOLDER / "train.yaml")

    def broken(change: Any) -> list[str]:
        document = copy.deepcopy(good)
        change(document["spec"])
        return problems(document)

    def worker(spec: Any) -> Any:
        return spec["rayClusterSpec"]["workerGroupSpecs"][0]

    assert broken(lambda spec: spec.pop("entrypoint"))
    assert broken(lambda spec: spec.update(backOffLimit=3))
    assert broken(lambda spec: spec.update(submissionMode="K8sJob"))
    assert broken(lambda spec: spec["rayClusterSpec"].pop("headGroupSpec"))
    assert broken(lambda spec: worker(spec).update(replicas="8"))
    assert broken(lambda spec: worker(spec)["rayStartParams"].update({"num-cpus": 0}))
    assert broken(lambda spec: worker(spec)["template"]["spec"]["containers"][0].pop("image"))
    assert broken(lambda spec: worker(spec)["template"]["spec"]["containers"][0]["volumeMounts"][0].pop("mountPath"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_what_a_manifest_says_agrees_with_itself_and_the_project(path: Path) -> None:
    spec = read(path)["spec"]
    cluster = spec["rayClusterSpec"]
    lock = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert lock and cluster["rayVersion"] == lock[1]
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    images = {c["image"] for t in [*templates, spec["submitterPodTemplate"]] for c in t["spec"]["containers"]}
    assert len(images) == 1
    for template in templates:
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        (container,) = template["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_entrypoints_are_commands_of_this_project() -> None:
    words = {path.name: shlex.split(read(path)["spec"]["entrypoint"]) for path in MANIFESTS}
    assert words["train.yaml"][:3] == ["python", "-m", "training.train"]
    config = read_config(words["train.yaml"][3:])
    (group,) = read(FOLDER / "train.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert config.hardware.world == group["replicas"] * gpus and config.ray.address == "auto"
    assert config.ray.cpus * gpus <= int(limits["cpu"]) and config.size == "3.3b"
    mounted = [m["mountPath"] for m in group["template"]["spec"]["containers"][0]["volumeMounts"]]
    assert str(Path(config.run).parent) in mounted and config.cache in mounted
    assert words["ingest.yaml"][:3] == ["python", "-m", "pipelines.ingest"]
    asked = settings.parse(ingest.IngestConfig, words["ingest.yaml"][3:])
    assert asked.run.address == "auto" and asked.out.startswith("s3://")
