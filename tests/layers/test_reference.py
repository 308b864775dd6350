"""The choice between references and fast paths."""

import runpy

import pytest

from effbackbones.layers.reference import __file__ as module_file
from effbackbones.layers.reference import ops_backend, use_reference


def test_context_forces_a_path_and_restores_the_one_before():
    with ops_backend("auto"):
        assert not use_reference()
        with ops_backend("reference"):
            assert use_reference()
            with ops_backend("auto"):
                assert not use_reference()
            assert use_reference()
        assert not use_reference()


def test_error_within_the_context_restores_the_path():
    before = use_reference()
    with pytest.raises(RuntimeError), ops_backend("auto" if before else "reference"):
        raise RuntimeError
    assert use_reference() is before


def test_unknown_path_raises_and_changes_nothing():
    before = use_reference()
    message = "the operators' backend is 'fast'; expected one of auto, torch, reference"
    with pytest.raises(ValueError, match=message), ops_backend("fast"):
        pass
    assert use_reference() is before


@pytest.mark.parametrize(
    ("value", "reference"), [(None, False), ("auto", False), ("torch", False), ("reference", True)]
)
def test_environment_variable_chooses_at_import(value, reference, monkeypatch):
    monkeypatch.delenv("EFFBACKBONES_OPS", raising=False)
    if value:
        monkeypatch.setenv("EFFBACKBONES_OPS", value)
    assert runpy.run_path(module_file)["use_reference"]() is reference


@pytest.mark.parametrize("value", ["fast", ""])
def test_bad_environment_variable_raises_and_names_it(value, monkeypatch):
    monkeypatch.setenv("EFFBACKBONES_OPS", value)
    with pytest.raises(
        ValueError, match=f"environment variable EFFBACKBONES_OPS is '{value}'; expected one of auto, torch, reference"
    ):
        runpy.run_path(module_file)
