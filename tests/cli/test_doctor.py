"""`duetto doctor` also works where the native module does not."""

import json

import pytest

from duetto.cli import doctor
from duetto.measure import installation


def test_a_native_module_that_cannot_be_loaded_is_named(monkeypatch, capsys):
    monkeypatch.setattr(installation, "why_unavailable", lambda: "cannot be loaded (bad magic)")
    report = installation.describe_installation()
    assert report["native_module"] is False
    assert report["cpu_features"] == []
    assert report["instruction_sets"] == {"used": None, "missing": {}}
    assert report["backends"] == ["reference"]
    assert "bad magic" in report["cpu_backend_lacks"]
    json.dumps(report)
    with pytest.raises(SystemExit) as ended:
        doctor.doctor(json_output=True)
    assert ended.value.code == 1
    assert "bad magic" in capsys.readouterr().out
