"""The table of docs/reliability.md: complete, and what the tests measured."""

import importlib.util
import json
import pathlib
import re
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TESTS = ROOT / "tests"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("fault_table", ROOT / "scripts/fault_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_table"] = module
    spec.loader.exec_module(module)
    return module


def marked() -> set[int]:
    """Numbers that tests are marked with."""
    calls = [
        found
        for path in TESTS.rglob("test_*.py")
        for found in re.findall(r"\bfault\(([\d, ]+)\)", path.read_text())
    ]
    return {int(number) for call in calls for number in call.split(",")}


def test_every_fault_is_made_or_says_why_not(script: Any) -> None:
    assert list(script.FAULTS) == list(range(1, 36))
    not_made = {number for number, fault in script.FAULTS.items() if fault.not_made}
    assert marked() | not_made == set(script.FAULTS) and not marked() & not_made


def test_the_page_shows_the_results_that_are_kept(script: Any) -> None:
    results = json.loads(script.RESULTS.read_text())
    text = script.PAGE.read_text()
    assert script.page(text, results) == text
    for result in results:
        path, _, name = result["test"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), result["test"]
        assert result["outcome"] == "passed", result["test"]


def result_of(test: str, faults: list[int], *figures: Any, outcome: str = "passed") -> Any:
    return {"test": test, "faults": faults, "outcome": outcome, "figures": list(figures)}


def test_rows(script: Any) -> None:
    results = [
        result_of("a", [1, 2], {"fault": 1, "survived": True, "lost": 0, "recovery_s": 0.5}),
        result_of("b", [1], {"fault": 1, "survived": True, "lost": 3, "bound_kept": True}),
        result_of("c", [2], outcome="failed"),
        result_of("d", [3], {"fault": 3, "survived": True, "exit_code": 4}),
        result_of("e", [4], outcome="skipped"),
    ]
    lines = script.rows(results)
    cells = {i: [x.strip() for x in lines[i + 1].split("|")[4:-1]] for i in range(1, 5)}
    assert cells[1] == ["2 pass", "yes", "0 to 3", "0.5", "kept", ""]
    assert cells[2] == ["**1 of 2 fail**", "", "", "", "", ""]
    assert cells[3] == ["1 pass", "yes", "", "", "", "4"]
    assert cells[4] == ["not measured", "", "", "", "", ""]
    assert len(lines) == 2 + 35


def test_new_results_replace_old_ones_unless_they_were_skipped(script: Any) -> None:
    old = [result_of("a", [1]), result_of("b", [1])]
    new = [result_of("b", [2]), result_of("a", [1], outcome="skipped"), result_of("c", [3])]
    assert [(x["test"], x["faults"]) for x in script.merged(old, new)] == [
        ("a", [1]),
        ("b", [2]),
        ("c", [3]),
    ]
