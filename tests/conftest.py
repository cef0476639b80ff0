"""Fixtures that all tests share."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Neither is about the code: how long an example takes is the machine's affair.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random checkpoint, written as a user would."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    command = [sys.executable, "-m", "duetto", "make-model", "tiny", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path
