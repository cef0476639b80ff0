"""Fixtures that all tests share."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random checkpoint, written as a user would."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    command = [sys.executable, "-m", "duetto", "make-model", "tiny", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path
