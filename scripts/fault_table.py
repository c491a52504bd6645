"""Runs the fault suite and writes its table into docs/reliability.md.

    python scripts/fault_table.py                      all of it, about half an hour on two cores
    python scripts/fault_table.py tests/transport      only these; other rows keep their figures
    python scripts/fault_table.py -m "faults and not slow"
    python scripts/fault_table.py --no_run             only writes the table

Arguments are pytest's. Results of the tests are kept in docs/fault_table.json; those of a test
that ran again take the place of the old ones.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "fault_table.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"

Result = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    what: str
    """What is injected."""
    then: str
    """What has to happen."""
    not_made: str = ""
    """Why no test injects it; empty for those that some test does."""


_OOM = "XLA's CPU backend has no memory limit of its own to run into; needs an accelerator"

FAULTS: Mapping[int, Fault] = {
    1: Fault("env process exits in an episode", "its episode is invalid, the process is replaced"),
    2: Fault("env process dies of SIGSEGV", "the same; the signal is in log and metrics"),
    3: Fault("env step hangs", "killed at its deadline and replaced; a dead lease gives credit"),
    4: Fault("env 50 times slower", "the learner waits in order; the alarm names group and age"),
    5: Fault("env answers with a wrong shape", "refused by name; set aside after k in a row"),
    6: Fault("NaN in observation or MJX state", "sample not trained on, world reset, counted"),
    7: Fault("all envs NaN", "the run stops with a message after a limit"),
    8: Fault("NaN in a gradient, once", "step skipped, optimizer untouched, counted"),
    9: Fault("NaN in gradients, N in a row", "stops; names the last good checkpoint"),
    10: Fault("policy server raises", "restarted with the newest version; requests asked again"),
    11: Fault("policy server killed", "never an older version than acknowledged; asked again"),
    12: Fault("learner killed", "goes on from its checkpoint; samples of the future are refused"),
    13: Fault("killed while saving", "previous step is restored, the torn one removed"),
    14: Fault("checkpoint bytes flipped", "previous step with a warning; none left: refuses"),
    15: Fault("checkpoint truncated or a file missing", "as 14"),
    16: Fault("disk full", "training goes on, saved later, stops after a limit"),
    17: Fault("SIGTERM", "update finished, checkpoint, exit code 3 within the grace"),
    18: Fault("SIGTERM while saving", "one complete checkpoint of that update"),
    19: Fault("stopped and resumed", "losses and parameters equal to the bit (S = 0)"),
    20: Fault("slow learner", "simulators wait, the queue stays bounded, nothing is dropped"),
    21: Fault("slow simulators", "learner and server idle without spinning, reported as waiting"),
    22: Fault("tiny byte limit of the queue", "back-pressure, no growth"),
    23: Fault("publication breaks off", "old version serves on, no mixed tree, sent again"),
    24: Fault("published tree misnamed or misshaped", "refused before any server has it"),
    25: Fault("server stays on an old version", "admission stops at S; the alarm names it"),
    26: Fault("flood of requests, 10 x capacity", "busy answers; accepted ones stay quick"),
    27: Fault("hostile bytes", "connection closed, nothing allocated or run, server lives"),
    28: Fault("missing or wrong token", "refused before anything is parsed"),
    29: Fault("malformed config", "one line with key, value and fix; exit code 2"),
    30: Fault("Ray's head node killed", "noticed in bounded time; the same command goes on"),
    31: Fault("network partition", "noticed as silence, tickets given up, nothing taken twice"),
    32: Fault("clock jumps", "no lease fires: only monotonic clocks are read"),
    33: Fault("shape drift after compilation", "refused with its size, or counted as recompile"),
    34: Fault("device memory exhausted in a server", "smaller buckets or a stop at start", _OOM),
    35: Fault("what a run leaves behind", "no process, shared memory, socket or temporary file"),
}


def rows(results: Iterable[Result]) -> list[str]:
    """The table's lines, header included, from results of tests."""
    lines = [
        "| # | fault | what has to happen | tests | survived | lost | s to go on | bound | exit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    results = list(results)
    for number, fault in FAULTS.items():
        own = [result for result in results if number in result["faults"]]
        lines.append(_row(number, fault, own))
    return lines


def _row(number: int, fault: Fault, results: list[Result]) -> str:
    if fault.not_made:
        return f"| {number} | {fault.what} | {fault.then} | not made: {fault.not_made} | | | | | |"
    figures = [x for r in results for x in r["figures"] if x["fault"] == number]
    cells = (
        _tests(results),
        "yes"
        if figures and all(x.get("survived") for x in figures)
        else ""
        if not figures
        else "**no**",
        _range(figures, "lost"),
        _range(figures, "recovery_s"),
        _all_of(figures, "bound_kept", "kept", "**broken**"),
        _range(figures, "exit_code"),
    )
    return f"| {number} | {fault.what} | {fault.then} | " + " | ".join(cells) + " |"


def _tests(results: list[Result]) -> str:
    """How many, and how they ended."""
    ran = [result for result in results if result["outcome"] != "skipped"]
    if not ran:
        return "not measured"
    failed = sum(result["outcome"] == "failed" for result in ran)
    return f"**{failed} of {len(ran)} fail**" if failed else f"{len(ran)} pass"


def _range(figures: list[Result], name: str) -> str:
    """Smallest and largest figure of a name."""
    values = sorted({x[name] for x in figures if name in x})
    if not values:
        return ""
    texts = [f"{x:.2g}" if isinstance(x, float) and x < 10 else f"{x:.0f}" for x in values]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _all_of(figures: list[Result], name: str, yes: str, no: str) -> str:
    values = [x[name] for x in figures if name in x]
    return "" if not values else yes if all(values) else no


def page(text: str, results: Iterable[Result]) -> str:
    """The page with a new table."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, *rows(results), END + tail])


def merged(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """Results by test, the new ones before the old ones; a test that was skipped tells nothing."""
    by_test = {result["test"]: result for result in old}
    by_test |= {result["test"]: result for result in new if result["outcome"] != "skipped"}
    return sorted(by_test.values(), key=lambda result: result["test"])


def measure(arguments: list[str]) -> list[Result]:
    """Runs pytest on the suite; exits with its code if it could not run any test."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.json"
        command = [sys.executable, "-m", "pytest", "-m", "faults", f"--fault_report={report}"]
        code = subprocess.run([*command, *arguments], cwd=ROOT).returncode
        if not report.exists():
            sys.exit(code)
        return json.loads(report.read_text())


def main() -> None:
    """See the module docstring."""
    arguments = sys.argv[1:]
    results: list[Result] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if arguments != ["--no_run"]:
        # All of it: what is no longer a test shall not stay.
        results = merged(results if arguments else [], measure(arguments))
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
