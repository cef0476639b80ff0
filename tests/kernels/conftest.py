"""Triton's interpreter takes loop bounds out of arrays of one number, of which numpy warns."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0")
