"""The public names: what is listed is what can be imported, and nothing else is offered."""

import pytest

import duetto


def test_every_listed_name_can_be_imported():
    assert len(set(duetto.__all__)) == len(duetto.__all__)
    for name in duetto.__all__:
        assert getattr(duetto, name) is not None


def test_every_class_is_where_it_says():
    for name in set(duetto.__all__) - {"__version__"}:
        assert getattr(duetto, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        _ = duetto.Manager


def test_the_native_module_is_built():
    from duetto import _native  # noqa: PLC0415  the import is what is tested

    assert isinstance(_native.cpu_features(), list)
