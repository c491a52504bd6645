"""The fault suite as pytest sees it: which tests belong to which fault, and what they measured.

    @pytest.mark.fault(11)      the test injects fault 11 of docs/reliability.md
    fault_row(survived=True)    figures of it, for the table there

Wherever it lies, such a test also has the marker `faults`: `pytest -m faults` runs them all, and
`--fault_report=FILE` writes down how each ended, for `scripts/fault_table.py`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

LAST_FAULT = 35
_NUMBERS, _FIGURES = "fault_numbers", "fault_figures"
"""Names of user properties of a test: they reach the report also from processes of pytest-xdist."""

FaultRow = Callable[..., None]


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> FaultRow:
    """Records figures of the test's fault; all of them are optional.

    Keyword arguments:
      fault: its number, if the test has several.
      survived: the run, or what the fault hit, went on or ended as it should.
      lost: trajectories given up because of the fault, from the ledger.
      recovery_s: seconds from the fault to the next learner update, or to normal service.
      bound_kept: no sample was staler than the bound.
      exit_code: of the command.
      note: a few words.
    """
    numbers = _numbers(request.node)

    def record(
        *,
        fault: int | None = None,
        survived: bool | None = None,
        lost: int | None = None,
        recovery_s: float | None = None,
        bound_kept: bool | None = None,
        exit_code: int | None = None,
        note: str = "",
    ) -> None:
        number = numbers[0] if fault is None and len(numbers) == 1 else fault
        assert number in numbers, f"fault {number}: the test is of {numbers}"
        figures = {
            "fault": number,
            "survived": survived,
            "lost": lost,
            "recovery_s": None if recovery_s is None else round(recovery_s, 2),
            "bound_kept": bound_kept,
            "exit_code": exit_code,
            "note": note,
        }
        present = {name: value for name, value in figures.items() if value not in (None, "")}
        request.node.user_properties.append((_FIGURES, present))

    return record


def mark_faults(items: list[pytest.Item]) -> None:
    """Gives the marker `faults` to every test that names a fault.

    Raises:
      pytest.UsageError: there is no such fault.
    """
    for item in items:
        numbers = _numbers(item)
        if not numbers:
            continue
        if not all(isinstance(n, int) and 1 <= n <= LAST_FAULT for n in numbers):
            raise pytest.UsageError(f"{item.nodeid}: faults {numbers}, they go up to {LAST_FAULT}")
        item.add_marker(pytest.mark.faults)
        item.user_properties.append((_NUMBERS, numbers))


def _numbers(item: pytest.Item) -> list[int]:
    return sorted({n for mark in item.iter_markers("fault") for n in mark.args})


class FaultReport:
    """Pytest plug-in that writes how the tests of faults ended.

    The file is a JSON list of {"test", "faults", "outcome", "duration_s", "figures"}.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After each phase of each test."""
        properties: dict[str, Any] = dict(report.user_properties)
        if _NUMBERS not in properties or (report.when != "call" and report.passed):
            return
        earlier = self._results.get(report.nodeid, {})
        has_failed = earlier.get("outcome") == "failed"
        self._results[report.nodeid] = {
            "test": report.nodeid,
            "faults": properties[_NUMBERS],
            "outcome": "failed" if has_failed else report.outcome,
            "duration_s": round(earlier.get("duration_s", 0.0) + report.duration, 2),
            "figures": [value for name, value in report.user_properties if name == _FIGURES],
        }

    def pytest_sessionfinish(self) -> None:
        """Writes the file."""
        results = sorted(self._results.values(), key=lambda result: result["test"])
        self._path.write_text(json.dumps(results, indent=1) + "\n")
