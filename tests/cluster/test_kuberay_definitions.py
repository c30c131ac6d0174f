"""The manifests in cluster/kuberay against KubeRay's own CRDs, read as strictly as `kubectl apply --validate=strict` reads them.

The CRDs are next to the repository, on some machines only; elsewhere only `test_manifests.py` checks the manifests.
"""

from __future__ import annotations

import copy
import gzip
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEFINITIONS = ROOT.parent / "shared" / "data" / "kuberay-crds"
KINDS = ("RayCluster", "RayJob", "RayService")
DOCUMENTS = [
    pytest.param(document, id=f"{path.name}-{document['kind']}")
    for path in sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if document and document["kind"] in KINDS
]

pytestmark = pytest.mark.skipif(not DEFINITIONS.is_dir(), reason="KubeRay's CRDs are not on this machine")


@cache
def schema_of(kind: str, api_version: str) -> dict[str, Any]:
    """The strict JSON schema of a kind, from its CRD."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with gzip.open(DEFINITIONS / f"ray.io_{kind.lower()}s.yaml.gz", "rt") as file:
        definition = yaml.load(file, loader)["spec"]
    assert definition["names"]["kind"] == kind
    (version,) = (v for v in definition["versions"] if f"{definition['group']}/{v['name']}" == api_version)
    assert version["served"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which no CRD describes
    return schema


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI v3 schema of a CRD as a JSON schema that refuses unknown fields."""
    schema = dict(schema)
    for key in ("properties", "patternProperties"):
        if key in schema:
            schema[key] = {name: strict(inner) for name, inner in schema[key].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema


def check(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema_of(document["kind"], document["apiVersion"])).validate(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_manifests_are_as_kuberay_defines_them(document):
    check(document)


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("document", DOCUMENTS)
def test_unknown_fields_and_wrong_values_are_refused(document):
    def refused(change: dict[str, Any], *path: str | int) -> str:
        changed = copy.deepcopy(document)
        part: Any = changed if path[:1] == ("document",) else cluster_of(changed)
        for key in path:
            part = part if key == "document" else part[key]
        part.update(change)
        with pytest.raises(jsonschema.ValidationError) as caught:
            check(changed)
        return caught.value.message

    container = ("headGroupSpec", "template", "spec", "containers", 0)
    assert "'spce' was unexpected" in refused({"spce": {}}, "document")
    assert "'headGroupSpecs' was unexpected" in refused({"headGroupSpecs": {}})
    assert "'maxReplica' was unexpected" in refused({"maxReplica": 2}, "workerGroupSpecs", 0)
    assert "'volumeMount' was unexpected" in refused({"volumeMount": []}, *container)
    assert "is not of type" in refused({"ports": [{"containerPort": "http"}]}, *container)
    assert "does not match" in refused({"limits": {"cpu": "four"}}, *container, "resources")
    assert "is not one of" in refused({"upscalingMode": "Fast"}, "autoscalerOptions")
