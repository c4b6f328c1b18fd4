"""The files of deploy/ray, by the code of Ray which reads them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from nybble.server.ray.application import BalancerArguments, ServerArguments

FOLDER = Path(__file__).parents[2] / "deploy/ray"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def test_the_applications_are_what_serve_deploys_with_arguments_that_exist() -> None:
    site = ServeDeploySchema.model_validate(read("serve.yaml"))
    assert site.proxy_location == "Disabled"
    by_name = {each.name: each for each in site.applications}
    servers = ServerArguments.model_validate(by_name["nybble"].args)
    assert servers.balancer in by_name
    assert BalancerArguments.model_validate(by_name["balancer"].args).servers in by_name


def test_kuberay_gets_the_same_applications_on_ports_and_pods_that_fit() -> None:
    service = read("rayservice.yaml")["spec"]
    assert yaml.safe_load(service["serveConfigV2"]) == read("serve.yaml")
    cluster = service["rayClusterConfig"]
    wanted = f"ray[serve]=={cluster['rayVersion']}"
    assert wanted in Path(__file__).with_name("requirements.txt").read_text()
    arguments = {each["name"]: each["args"] for each in read("serve.yaml")["applications"]}
    # The service finds the head's port by its name, and finds none of the workers.
    (port,) = service["serveService"]["spec"]["ports"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in head["ports"]}
    assert ports[port["targetPort"]] == arguments["balancer"]["port"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert "ports" not in worker
    assert group["maxReplicas"] >= arguments["nybble"]["max_replicas"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == arguments["nybble"]["gpus"]


def test_the_cluster_is_what_ray_up_takes() -> None:
    cluster = read("cluster.yaml")
    for path in cluster["file_mounts"].values():
        assert (FOLDER / path).exists()
    validate_config(prepare_config(cluster))
    # Every command is one of those which its setup installs.
    for kind in ("head", "worker"):
        for line in cluster[f"{kind}_start_ray_commands"]:
            assert shlex.split(line)[0] == "~/nybble/bin/ray"
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(read("cluster.yaml") | {"setup_comands": []}))
