"""What is read of /proc/cpuinfo."""

from pathlib import Path

import pytest

from effbackbones.cpu import cpu_field

TWO = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: A: B\n\nprocessor\t: 1\nmodel name\t: C\n"


@pytest.mark.parametrize(("key", "value"), [("vendor_id", "AuthenticAMD"), ("model name", "A: B"), ("model", "")])
def test_field_is_that_of_the_first_processor(key, value, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: TWO)
    assert cpu_field(key) == value


def test_field_is_empty_where_there_is_no_such_file(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert cpu_field("model name") == ""
