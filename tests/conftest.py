"""Fixtures that all tests share."""

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Neither is about the code: how long an example takes is the machine's affair.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")

# Tests of the GPU's kernels have an environment of their own: `make kernels`.
collect_ignore = [] if find_spec("triton") else ["kernels"]


def pytest_configure(config: pytest.Config) -> None:
    """What "auto" is must not depend on the machine: only the kernels' own tests see a GPU."""
    if not any("kernels" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Eleven thousand tests stay to the end: the collector need not look through them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random checkpoint, written as a user would."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    command = [sys.executable, "-m", "duetto", "make-model", "tiny", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path
