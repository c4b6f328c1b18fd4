"""The examples for Kubernetes are valid, and agree with the server and its image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from typer.core import TyperGroup

from nybble.engine import Engine
from nybble.server.cli.main import app
from nybble.server.tenancy.tenants import Tenants

from .client import Client, run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"
# Schemas of kinds which are not Kubernetes' own; `make lint-deploy` downloads them.
CRDS = ROOT / "build/crds"
OWN_GROUPS = ("gateway.networking.k8s.io", "inference.networking.k8s.io", "keda.sh", "ray.io")
Manifest = dict[str, Any]


def manifests(file: str) -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def find(file: str, kind: str, name: str | None = None) -> Manifest:
    (found,) = (
        each
        for each in manifests(file)
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    )
    return found


FILES = (
    *("one-server.yaml", "replicas.yaml", "autoscale.yaml", "gateway.yaml"),
    "../ray/rayservice.yaml",
)
EVERY = [(file, each) for file in FILES for each in manifests(file)]
BUILT_IN = [each for _, each in EVERY if not each["apiVersion"].startswith(OWN_GROUPS)]
CUSTOM = [each for _, each in EVERY if each["apiVersion"].startswith(OWN_GROUPS)]
SERVERS = ("one-server.yaml", "replicas.yaml")


def pod_of(file: str) -> Manifest:
    pod: Manifest = find(file, "Deployment", "nybble")["spec"]["template"]
    return pod


def server_of(file: str) -> Manifest:
    (server,) = pod_of(file)["spec"]["containers"]
    return dict(server)


def title(manifest: object) -> str | None:
    return (
        f"{manifest['kind']}/{manifest['metadata']['name']}" if isinstance(manifest, dict) else None
    )


@pytest.mark.parametrize("manifest", BUILT_IN, ids=title)
def test_every_object_has_kubernetes_schema(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_a_typing_error_would_be_found() -> None:
    service = find("one-server.yaml", "Service")
    broken = {**service, "spec": {**service["spec"], "selectr": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectr"):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def closed(schema: Any) -> Any:
    """A schema in which an object has no fields besides those it lists."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(each) for key, each in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        found.setdefault("additionalProperties", False)
    return found


@cache
def definitions() -> list[dict[str, Any]]:
    found = (yaml.safe_load_all(file.read_text()) for file in CRDS.glob("*.yaml"))
    return [crd["spec"] for file in found for crd in file if crd]


def custom_schema(manifest: Manifest) -> Any:
    group, version = manifest["apiVersion"].split("/")
    for spec in definitions():
        if (spec["group"], spec["names"]["kind"]) == (group, manifest["kind"]):
            for each in spec["versions"]:
                if each["name"] == version:
                    # Only what Kubernetes itself checks of metadata is missing there.
                    schema = closed(each["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = {"type": "object"}
                    return schema
    raise AssertionError(f"no schema of {manifest['kind']} in {CRDS}")


@pytest.mark.skipif(not CRDS.is_dir(), reason="the schemas are downloaded by make lint-deploy")
@pytest.mark.parametrize("manifest", CUSTOM, ids=title)
def test_every_custom_object_has_the_schema_of_its_definition(manifest: Manifest) -> None:
    schema = custom_schema(manifest)
    jsonschema.validate(manifest, schema)
    broken = {**manifest, "spec": {**manifest["spec"], "selectr": {}}}
    with pytest.raises(jsonschema.ValidationError, match="selectr"):
        jsonschema.validate(broken, schema)


@pytest.mark.parametrize("file", SERVERS)
def test_names_lead_somewhere(file: str) -> None:
    pod, server = pod_of(file), server_of(file)
    labels = pod["metadata"]["labels"].items()
    service = find(file, "Service", "nybble")
    assert service["spec"]["selector"].items() <= labels
    deployment = find(file, "Deployment", "nybble")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    (port,) = server["ports"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for spec in pod_specs(file):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        containers = [*spec["containers"], *spec.get("initContainers", ())]
        mounted = {mount["name"] for each in containers for mount in each["volumeMounts"]}
        assert mounted == set(volumes)
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                find(file, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            if "secret" in volume:
                find(file, "Secret", volume["secret"]["secretName"])


def pod_specs(file: str) -> Iterator[Manifest]:
    """Of pods with volumes."""
    for each in manifests(file):
        spec = each.get("spec", {}).get("template", {}).get("spec", {})
        if "volumes" in spec:
            yield spec


def test_servers_share_what_they_may_and_leave_one_after_the_other() -> None:
    server, pod = server_of("replicas.yaml"), pod_of("replicas.yaml")
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    options = dict(each.removeprefix("--").split("=") for each in server["args"] if "=" in each)
    folder = str(Path(options["model"]).parent)
    assert mounts[folder]["readOnly"]
    (packing,) = find("replicas.yaml", "Job")["spec"]["template"]["spec"]["containers"]
    (script,) = packing["args"]
    assert f"nybble pack {options['served-model-name']} " in script
    assert script.rstrip().endswith(f" {options['model']}")
    assert options["lora-registry"] in mounts
    for each in ("nybble-packed", "nybble-adapters"):
        claim = find("replicas.yaml", "PersistentVolumeClaim", each)
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    quotas = find("replicas.yaml", "Service", "nybble-quotas")
    host = f"{quotas['metadata']['name']}:{quotas['spec']['ports'][0]['port']}"
    assert options["quota-store"].startswith(f"redis://{host}/")
    labels = pod["metadata"]["labels"].items()
    budget = find("replicas.yaml", "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    strategy = find("replicas.yaml", "Deployment", "nybble")["spec"]["strategy"]
    assert strategy["rollingUpdate"]["maxUnavailable"] == 0


def test_the_gateway_leads_to_the_servers_and_the_picker_to_their_metrics(engine: Engine) -> None:
    pool = find("gateway.yaml", "InferencePool")
    labels = pod_of("replicas.yaml")["metadata"]["labels"].items()
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels
    (port,) = server_of("replicas.yaml")["ports"]
    assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    route = find("gateway.yaml", "HTTPRoute")
    names = {ref["name"] for rule in route["spec"]["rules"] for ref in rule["backendRefs"]}
    assert names == {
        pool["metadata"]["name"],
        find("replicas.yaml", "Service", "nybble")["metadata"]["name"],
    }
    assert (
        route["spec"]["parentRefs"][0]["name"]
        == find("gateway.yaml", "Gateway")["metadata"]["name"]
    )
    values = yaml.safe_load((FOLDER / "llm-d-values.yaml").read_text())["router"]
    assert values["modelServers"]["matchLabels"].items() <= labels
    plugins = yaml.safe_load(
        values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]]
    )
    named = {plugin["type"] for plugin in plugins["plugins"]}
    (profile,) = plugins["schedulingProfiles"]
    assert {each["pluginRef"] for each in profile["plugins"]} <= named
    assert "--vllm-metrics" in server_of("replicas.yaml")["args"]
    # What the autoscaler asks Prometheus for is what servers have.
    scaled = find("autoscale.yaml", "ScaledObject")["spec"]
    find("replicas.yaml", scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"])
    queries = " ".join(trigger["metadata"]["query"] for trigger in scaled["triggers"])

    async def scenario(client: Client) -> None:
        text = await (await client.get("/metrics")).text()
        for name in re.findall(r"nybble_\w+", queries):
            assert f"\n{name}" in text

    run(engine, scenario)


@pytest.mark.parametrize("file", SERVERS)
def test_the_arguments_are_options_of_the_server_and_leave_it_time_to_stop(file: str) -> None:
    pod, server, secret = pod_of(file), server_of(file), find(file, "Secret")
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    serve = group.commands["serve"]
    # A path that exists here in place of the Secret's.
    folder = next(m["mountPath"] for m in server["volumeMounts"] if m["name"] == "tenants")
    (name,) = secret["stringData"]
    assert f"--tenants={folder}/{name}" in server["args"]
    arguments = [argument.replace(f"{folder}/{name}", __file__) for argument in server["args"]]
    with serve.make_context("serve", arguments) as context:
        seconds = context.params["shutdown_timeout"]
        assert context.params["log_format"] == "json"
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > seconds + pause


@pytest.mark.parametrize("file", SERVERS)
def test_the_tenants_file_can_be_read(file: str, tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(find(file, "Secret")["stringData"]["tenants.toml"])
    assert Tenants(path).find("a key") is None


@pytest.mark.parametrize("file", SERVERS)
def test_user_port_and_volume_are_those_of_the_image(file: str) -> None:
    pod, server = pod_of(file), server_of(file)
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {pod['spec']['securityContext']['runAsUser']}\n" in dockerfile
    assert f"EXPOSE {server['ports'][0]['containerPort']}\n" in dockerfile
    (volume,) = re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE)
    assert volume in {mount["mountPath"] for mount in server["volumeMounts"]}


@pytest.mark.parametrize("file", SERVERS)
def test_probes_and_prometheus_ask_for_what_the_server_has(file: str, engine: Engine) -> None:
    pod, server = pod_of(file), server_of(file)

    async def scenario(client: Client) -> None:
        probes = [
            server[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
        ]
        paths = {probe["path"] for probe in probes}
        paths.add(pod["metadata"]["annotations"]["prometheus.io/path"])
        for path in paths:
            assert (await client.get(path)).status == 200
        assert {probe["port"] for probe in probes} == {server["ports"][0]["name"]}

    run(engine, scenario, api_keys=("none of them is asked for",))
