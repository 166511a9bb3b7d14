"""The Kubernetes manifests of docs/: they parse, name their parts consistently, and only use options that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hecompile.cli.main import app
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
VERSIONS = {"Deployment": "apps/v1", "Service": "v1", "NetworkPolicy": "networking.k8s.io/v1"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifest(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        assert VERSIONS[document["kind"]] == document["apiVersion"]
        assert document["metadata"]["name"]
    deployments = [document["spec"] for document in found if document["kind"] == "Deployment"]
    services = [document["spec"] for document in found if document["kind"] == "Service"]
    assert len(deployments) == len(services) == 1
    pod = deployments[0]["template"]
    labels = pod["metadata"]["labels"]
    assert deployments[0]["selector"]["matchLabels"].items() <= labels.items()
    assert services[0]["selector"].items() <= labels.items()
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    for container in pod["spec"]["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        ports = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in services[0]["ports"]} <= ports
        assert container["readinessProbe"]["tcpSocket"]["port"] in ports


def test_the_workers_options_exist() -> None:
    (deployment,) = [one for one in documents(FOLDER / "worker.yaml") if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["worker", "serve", "--help"]).output
    for argument in container["args"]:
        assert argument.split("=")[0] in text, argument
