"""Value functions that a service is started with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagefork import ConfigError
from pagefork.server.functions import load_value_functions


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_are_found_in_the_current_directory_which_is_importable_for_that_alone(folder: Path) -> None:
    (folder / "own_values.py").write_text("def length(prompt):\n    return lambda leaves: [float(len(prompt))] * len(leaves)\n")
    before = list(sys.path)
    found = load_value_functions(["length=own_values:length", "parses=pagefork.value_functions:parses_as_python"])
    assert list(found) == ["length", "parses"]
    assert found["length"]("four")([1, 2]) == [4.0, 4.0]
    assert sys.path == before


def test_a_module_of_the_current_directory_takes_the_place_of_no_other(folder: Path) -> None:
    (folder / "json.py").write_text("raise SystemExit(1)")
    (folder / "using.py").write_text("import json\ndef made(prompt):\n    return json.dumps\n")
    sys.modules.pop("json")
    assert load_value_functions(["using=using:made"])["using"]("").__module__ == "json"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("own", "NAME=MODULE:FUNCTION"),
        ("=own:f", "NAME=MODULE:FUNCTION"),
        ("a b=own:f", "NAME=MODULE:FUNCTION"),
        ("a=own", "NAME=MODULE:FUNCTION"),
        ("a=own/x:f", "NAME=MODULE:FUNCTION"),
        ("a=no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("a=fails:f", "ZeroDivisionError"),
        ("a=leaves:f", "SystemExit"),
        ("a=os:no_such", "os has no function 'no_such'"),
        ("a=os:sep", "os has no function 'sep'"),
    ],
)
def test_what_is_not_there_is_refused_by_its_name(folder: Path, given: str, reason: str) -> None:
    (folder / "fails.py").write_text("1 / 0")
    (folder / "leaves.py").write_text("raise SystemExit(1)")
    before = list(sys.path)
    with pytest.raises(ConfigError, match=reason) as refused:
        load_value_functions([given])
    assert repr(given) in str(refused.value)
    assert sys.path == before


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="'a' is given twice"):
        load_value_functions(["a=pagefork.value_functions:brackets_balance"] * 2)
