"""The image for GPUs names what is there: files, flags, a health path, versions in bounds."""

import json
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from duetto.cli.app import app
from duetto.server.http.middleware import HEALTH_PATHS

ROOT = Path(__file__).parent.parent
FILE = (ROOT / "deploy" / "Dockerfile.cuda").read_text()


def test_what_is_copied_is_there():
    copied = re.findall(r"^COPY (?!--)(.*)$", FILE, re.MULTILINE)
    paths = [path for line in copied for path in line.split()[:-1]]
    assert "src" in paths and all((ROOT / path).exists() for path in paths)


def test_it_serves_with_flags_that_exist():
    (command,) = re.findall(r"^CMD (\[.*\])$", FILE, re.MULTILINE)
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


def test_it_runs_as_nobody_in_particular_and_is_watched():
    assert re.search(r"^USER (?!root|0)", FILE, re.MULTILINE)
    path = re.search(r"127\.0\.0\.1:8000(/\w+)", FILE)
    assert path is not None and path[1] in HEALTH_PATHS
