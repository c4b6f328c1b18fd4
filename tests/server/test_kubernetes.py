"""The example for Kubernetes is valid, and agrees with the server and its image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
OBJECTS: dict[str, dict[str, Any]] = {
    item["kind"]: item for item in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
}
POD: dict[str, Any] = OBJECTS["Deployment"]["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_object_has_kubernetes_schema(kind: str) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_a_typing_error_would_be_found() -> None:
    broken = {**OBJECTS["Service"], "spec": {**OBJECTS["Service"]["spec"], "selectr": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectr"):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_names_lead_somewhere() -> None:
    labels = POD["metadata"]["labels"].items()
    assert OBJECTS["Service"]["spec"]["selector"].items() <= labels
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    assert {mount["name"] for mount in SERVER["volumeMounts"]} == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    secret = volumes["tenants"]["secret"]["secretName"]
    assert secret == OBJECTS["Secret"]["metadata"]["name"]
    (port,) = SERVER["ports"]
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_arguments_are_options_of_the_server_and_leave_it_time_to_stop() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    serve = group.commands["serve"]
    # A path that exists here in place of the Secret's.
    folder = next(m["mountPath"] for m in SERVER["volumeMounts"] if m["name"] == "tenants")
    (file,) = OBJECTS["Secret"]["stringData"]
    assert f"--tenants={folder}/{file}" in SERVER["args"]
    arguments = [argument.replace(f"{folder}/{file}", __file__) for argument in SERVER["args"]]
    with serve.make_context("serve", arguments) as context:
        seconds = context.params["shutdown_timeout"]
        assert context.params["log_format"] == "json"
    pause = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["spec"]["terminationGracePeriodSeconds"] > seconds + pause


def test_the_tenants_file_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(OBJECTS["Secret"]["stringData"]["tenants.toml"])
    assert Tenants(path).find("a key") is None


def test_user_port_and_volume_are_those_of_the_image() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {POD['spec']['securityContext']['runAsUser']}\n" in dockerfile
    assert f"EXPOSE {SERVER['ports'][0]['containerPort']}\n" in dockerfile
    (volume,) = re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE)
    assert volume in {mount["mountPath"] for mount in SERVER["volumeMounts"]}


def test_probes_and_prometheus_ask_for_what_the_server_has(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        probes = [
            SERVER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
        ]
        paths = {probe["path"] for probe in probes}
        paths.add(POD["metadata"]["annotations"]["prometheus.io/path"])
        for path in paths:
            assert (await client.get(path)).status == 200
        assert {probe["port"] for probe in probes} == {SERVER["ports"][0]["name"]}

    run(engine, scenario, api_keys=("none of them is asked for",))
