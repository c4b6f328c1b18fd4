"""Dashboard, alerts and the table of names speak of what a live server exports, and all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import promql_parser as promql
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from nybble.server.tenancy.tenants import new_key

from ..conftest import running_server

DEPLOY = Path(__file__).parents[3] / "deploy"
ALERTS = DEPLOY / "prometheus/alerts.yml"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/nybble.json").read_text())
# What Prometheus itself adds when it scrapes.
SCRAPE_LABELS = {"job", "instance"}


def panel_expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")


def alert_expressions() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


EXPRESSIONS = [*panel_expressions(), *alert_expressions()]


@pytest.fixture(scope="module")
def exported(
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Metric]:
    """A server's metrics after a tenant's request to an adapter, and one that is refused."""
    key, stored = new_key()
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    tenants.write_text(f'[tenants.acme]\nkeys = ["{stored}"]\n')
    adapter = ("--lora-modules", f"poet={tiny_adapter(seed=1)}", "--max-lora-rank", "8")
    state = ("--state-dir", str(tmp_path_factory.mktemp("state")), "--batches", "--fine-tuning")
    drafts = ("--draft-model", str(tiny_model()), "--speculate", "draft")
    shared = ("--lora-registry", str(tmp_path_factory.mktemp("registry")))
    quotas = ("--quota-store", "unix:///nowhere/redis.sock")  # away: each server counts alone
    options = ("--tenants", str(tenants), *adapter, *state, *drafts, *shared, *quotas)
    with running_server(tiny_model(), *options) as server:
        body = {"model": "poet", "prompt": "the fox", "max_tokens": 3, "ignore_eos": True}
        url, headers = f"{server.url}/v1/completions", {"Authorization": f"Bearer {key}"}
        assert httpx.post(url, json=body, headers=headers).status_code == 200
        assert httpx.post(url, json=body).status_code == 401
        return list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))


@pytest.fixture(scope="module")
def labels_of(exported: list[Metric]) -> dict[str, set[str]]:
    """The labels of each time series a server has, by its name."""
    labels: dict[str, set[str]] = {"up": set()}
    for family in exported:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize(
    "expression",
    [expression for _, expression in EXPRESSIONS],
    ids=[where for where, _ in EXPRESSIONS],
)
def test_what_a_panel_or_an_alert_asks_for_exists(
    expression: str, labels_of: dict[str, set[str]]
) -> None:
    selected: list[promql.VectorSelector] = []
    grouped: set[str] = set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            selected.append(node)
        elif isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    promql.walk(promql.parse(expression), visit)
    assert selected
    known = set(SCRAPE_LABELS)
    for selector in selected:
        assert selector.name in labels_of
        known |= labels_of[selector.name]
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= labels_of[selector.name] | SCRAPE_LABELS
    assert grouped <= known


def test_every_metric_has_its_line_in_the_table_of_names(exported: list[Metric]) -> None:
    table = (DEPLOY / "grafana/metrics.md").read_text()
    listed = dict(re.findall(r"^\| `(nybble_\w+)(?:{[^}]*})?` \| (\w+) \|", table, re.MULTILINE))
    suffixes = {"counter": "_total"}
    assert listed == {
        family.name + suffixes.get(family.type, ""): family.type
        for family in exported
        if family.name.startswith("nybble_") and not family.name.endswith("_created")
    }


def test_panels_are_of_the_provisioned_kind_of_data_source_and_do_not_overlap() -> None:
    provisioned = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    kinds = {source["type"] for source in provisioned["datasources"]}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] in kinds
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= taken
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_compose_mounts_folders_that_exist_and_prometheus_scrapes_the_server() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).is_dir()
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f'job="{scrape["job_name"]}"' in dict(alert_expressions())["NybbleDown"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_has_nothing_to_say_against_alerts_and_configuration(
    check: tuple[str, ...],
) -> None:
    result = subprocess.run(["promtool", *check], cwd=ALERTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
