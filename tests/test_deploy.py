"""What is in deploy/ names what is there: files, flags, ports, health paths, versions in bounds."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from duetto.cli.app import app
from duetto.cluster.address import read_address
from duetto.cluster.facts import ROLES
from duetto.cluster.ray_service import workers
from duetto.cluster.ray_workers import RayError
from duetto.server.http.middleware import HEALTH_PATHS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILE = (ROOT / "deploy" / "Dockerfile.cuda").read_text()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_what_is_copied_is_there(name):
    copied = re.findall(r"^COPY (?!--)(.*)$", (DEPLOY / name).read_text(), re.MULTILINE)
    paths = [path for line in copied for path in line.split()[:-1]]
    assert "src" in paths and all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_it_serves_with_flags_that_exist(name):
    (command,) = re.findall(r"^CMD (\[.*\])$", (DEPLOY / name).read_text(), re.MULTILINE)
    app.parse_args(json.loads(command), exit_on_error=False, print_error=False)


def test_versions_are_within_the_extras_bounds():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {
        r.name: r.specifier for r in map(Requirement, extras["optional-dependencies"]["cuda"])
    }
    installed = {r.name: r.specifier for r in map(Requirement, re.findall(r"'(\w+>=.*?)'", FILE))}
    assert set(installed) == set(bounds) == {"torch", "triton"}
    for name, specifier in installed.items():
        least = next(each.version for each in specifier if each.operator == ">=")
        assert least in bounds[name]
        assert "<" in {each.operator for each in SpecifierSet(str(specifier))}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_it_runs_as_nobody_in_particular_and_is_watched(name):
    text = (DEPLOY / name).read_text()
    assert re.search(r"^USER (?!root|0)", text, re.MULTILINE)
    path = re.search(r"127\.0\.0\.1:8000(/\w+)", text)
    assert path is not None and path[1] in HEALTH_PATHS


# --- clusters ----------------------------------------------------------------------------------

MANIFESTS = sorted(path.name for path in DEPLOY.glob("*.yaml"))
SECRETS = {"DUETTO_API_KEY", "DUETTO_CLUSTER_SECRET"}


def documents(name: str) -> list[Any]:
    return [*yaml.safe_load_all((DEPLOY / name).read_text())]


def pods() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A kind of workload of kubernetes.yaml, and its one container."""
    for document in documents("kubernetes.yaml"):
        if document["kind"] in ("Deployment", "StatefulSet"):
            (container,) = document["spec"]["template"]["spec"]["containers"]
            yield document, container


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line in deploy/, with what stands for values in place of variables."""
    for document, container in pods():
        yield document["metadata"]["name"], container["args"]
    compose = documents("docker-compose.yaml")[0]
    for name, service in compose["services"].items():
        yield f"compose {name}", service["command"]
    serving = yaml.safe_load(documents("rayservice.yaml")[0]["spec"]["serveConfigV2"])
    for application in serving["applications"]:
        arguments = application["args"]
        words = ["worker", *arguments["worker"], "--role", arguments["role"]]
        yield f"ray {application['name']}", words


ALL = [
    (name, [re.sub(r"\$\(POD_IP\)|\{ip\}", "10.0.0.1", word) for word in words])
    for name, words in commands()
]


def option(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_all_manifests_are_there_and_name_no_secret():
    assert MANIFESTS == ["docker-compose.yaml", "kubernetes.yaml", "rayservice.yaml"]
    for name in MANIFESTS:
        assert all(documents(name))
        for found in re.findall(r"(?:API_KEY|SECRET): *(\S+)", (DEPLOY / name).read_text()):
            assert found.startswith("${DUETTO_"), f"{name}: a secret is no part of a file"


@pytest.mark.parametrize(("name", "words"), ALL, ids=[name for name, _ in ALL])
def test_commands_have_flags_that_exist(name, words):
    if words[0] not in app:
        pytest.skip(f"duetto {words[0]} is not there yet")
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_addresses_and_ports_agree():
    listens = {option(words, "--listen") for _, words in ALL} - {None}
    assert listens == {"tcp://*:9000"}
    read_address("tcp://*:9000", "--listen", listens=True)
    names = {"router", "duetto-router"}  # a service of compose, and one of Kubernetes
    for _, words in ALL:
        join = option(words, "--join")
        if words[0] == "worker":
            address = read_address(join, "--join", listens=False)
            assert address.port == 9000 and address.host in names
    by_name = {document["metadata"]["name"]: container for document, container in pods()}
    router = {port["name"]: port["containerPort"] for port in by_name["duetto-router"]["ports"]}
    assert router == {"http": 8000, "workers": 9000}
    assert option(by_name["duetto-router"]["args"], "--port") == "8000"
    assert by_name["duetto-prefill"]["ports"] == [{"name": "kv", "containerPort": 9100}]
    link = option(by_name["duetto-prefill"]["args"], "--kv-link")
    assert link == "tcp://$(POD_IP):9100"
    for document in documents("kubernetes.yaml"):
        if document["kind"] == "Service":
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= set(router)


def test_services_find_the_pods_that_they_are_of():
    labels = [document["spec"]["template"]["metadata"]["labels"] for document, _ in pods()]
    for document, _ in pods():
        wanted = document["spec"]["selector"]["matchLabels"]
        assert wanted == document["spec"]["template"]["metadata"]["labels"]
    for document in documents("kubernetes.yaml"):
        if document["kind"] == "Service":
            assert document["spec"]["selector"] in labels
    roles = {option(container["args"], "--role") for _, container in pods()} - {None}
    assert roles == {"prefill", "decode"} < set(ROLES)  # each with its counterpart


def test_what_others_reach_has_a_key_and_what_joins_a_secret():
    for _, container in pods():
        given = {each["name"]: each.get("valueFrom", {}) for each in container["env"]}
        assert "secretKeyRef" in given["DUETTO_CLUSTER_SECRET"]
        if "--host" in container["args"]:
            assert "secretKeyRef" in given["DUETTO_API_KEY"]
    for name, service in documents("docker-compose.yaml")[0]["services"].items():
        wanted = SECRETS if name == "router" else {"DUETTO_CLUSTER_SECRET"}
        assert set(service["environment"]) == wanted
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
    for _, words in ALL:
        assert "--insecure-no-auth" not in words and "--api-key" not in words


def test_probes_and_time_to_end():
    for document, container in pods():
        pod = document["spec"]["template"]["spec"]
        shutdown = float(option(container["args"], "--shutdown-timeout"))
        assert pod["terminationGracePeriodSeconds"] > shutdown + 5
        assert pod["securityContext"]["runAsNonRoot"] and container["resources"]["requests"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if container["args"][0] == "router":
                assert container[probe]["httpGet"]["path"] in HEALTH_PATHS


def test_the_ray_service_is_what_the_manifest_imports():
    serving = yaml.safe_load(documents("rayservice.yaml")[0]["spec"]["serveConfigV2"])
    for application in serving["applications"]:
        module, _, function = application["import_path"].partition(":")
        assert (module, function) == (workers.__module__, workers.__name__)
        assert [each["name"] for each in application["deployments"]] == ["DuettoWorker"]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"worker": "a b"}, {"worker": [1]}, {"worker": ["m"], "role": "chef"}],
    ids=str,
)
def test_a_ray_service_of_wrong_arguments_is_refused(arguments):
    with pytest.raises(RayError, match=r"must be a list|accepted: both"):
        workers(arguments)
