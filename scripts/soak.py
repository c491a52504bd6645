"""A training whose processes are killed at random for minutes, and what is left of it in the end.

    python scripts/soak.py [--minutes=15] [--config=configs/debug.py] [--kind=processes]
        [--seed=0] [--json=FILE] [--keep=DIRECTORY] [--config.x=y ...]

Two simulators, two policy servers and a learner, each a process (or a Ray actor). When an update
has been made, one of them, of every kind in turn, gets SIGKILL, or now and then SIGSTOP: it hangs
until the run notices. The next one follows when the dead one has joined again and another update
has been made. After the time is over the run is stopped with SIGTERM, and then everything must
hold that holds for a run that nothing has happened to; the last lines say what did not, and the
exit code is 1.

Per kill: seconds to the next update of the run, seconds until the process had joined again and an
update was made with it, updates lost (the learner goes on from a checkpoint) and tickets lost.
Options that are not this script's are the run's, such as --config.evaluation.num_episodes=0.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from run_watch import Leftovers, RunWatch
from soak_checks import (
    HEADER,
    WARM_SHARE,
    Check,
    Kill,
    Record,
    files_check,
    memory_checks,
    record_checks,
    row,
    show,
    success_check,
    summary_rows,
)

_ROOT = pathlib.Path(__file__).parents[1]
KINDS = ("learner", "server", "simulator")
_POLL_S = 0.1
_NO_RECORD: Record = {"update": 0, "queue/dropped": 0}
_END_S = 20.0
"""For processes to be gone after the command has ended."""


class SoakError(RuntimeError):
    """The run did not get over something."""


class _FinishedError(Exception):
    """The run has made all of its updates."""


class Soak:
    """The run, and its killer."""

    def __init__(self, options: argparse.Namespace, workdir: pathlib.Path, temporary: pathlib.Path):
        self.options = options
        self.workdir = workdir
        self._random = random.Random(options.seed)
        self.kills: list[Kill] = []
        self.num_files: list[int] = []
        """Open files of the supervisor whenever the run had recovered."""
        self.lines: list[str] = []
        """Of the screen."""
        self._dropped: dict[int, int] = {}
        """Update -> tickets lost up to then."""
        self._num_read, self._record = 0, _NO_RECORD
        """Of metrics.jsonl: bytes that were read, and the newest record."""
        self.process = subprocess.Popen(
            self.command(),
            cwd=_ROOT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.watch = RunWatch(self.process.pid, workdir, temporary)

    def command(self, *more: str) -> list[str]:
        """The run's."""
        options = self.options
        return [
            *(sys.executable, "-m", "jaxvla.main", f"--config={options.config}"),
            f"--workdir={self.workdir}",
            f"--config.runtime.kind={options.kind}",
            f"--config.runtime.silence_s={options.silence_s:g}",
            # Restarts in a row count from 0 after ten healthy minutes, which nobody has here.
            "--config.runtime.max_restarts=10000",
            "--config.runtime.restart_backoff_s=0.05",
            "--config.simulation.num_simulators=2",
            "--config.serving.num_servers=2",
            f"--config.learning.num_updates={options.num_updates}",
            *options.overrides,
            *more,
        ]

    def run(self) -> int:
        """Kills until the time is over; returns the exit code of the run."""
        begin_s, _ = self._wait_for_update(1, "the first update")
        victims = self._victims()
        try:
            while time.monotonic() - begin_s < 60 * self.options.minutes:
                self._pause()
                self._kill(*next(victims), begin_s)
            self.process.send_signal(signal.SIGTERM)
        except _FinishedError:
            del self.kills[-1]  # nobody saw what came of it
        try:
            code = self.process.wait(timeout=self.options.patience_s)
        except subprocess.TimeoutExpired as error:
            raise SoakError("the run does not end") from error
        self._reader.join()
        return code

    def close(self) -> None:
        """Ends what is left of it."""
        if self._is_alive():
            self.process.kill()
            self.process.wait()
        self.watch.close()

    def records(self) -> list[Record]:
        """metrics.jsonl."""
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def _is_alive(self) -> bool:
        return self.process.poll() is None

    def _victims(self) -> Iterator[tuple[str, signal.Signals]]:
        """All kinds in turn, in random order, of each a random one."""
        while True:
            for kind in self._random.sample(KINDS, len(KINDS)):
                index = 0 if kind == "learner" else self._random.randrange(2)
                hangs = self._random.random() < self.options.hangs
                yield f"{kind}_{index}", signal.SIGSTOP if hangs else signal.SIGKILL

    def _pause(self) -> None:
        """A random time between kills, or less if the run ends."""
        end_s = time.monotonic() + self._random.uniform(0, self.options.pause_s)
        while time.monotonic() < end_s and self._is_alive():
            time.sleep(_POLL_S)

    def _kill(self, name: str, how: signal.Signals, begin_s: float) -> None:
        joins, num_lines, now_s = self._num_joins(name), len(self.lines), time.monotonic()
        update = self._newest()["update"]
        kill = Kill(name=name, signal=how.name, at_s=now_s - begin_s, update=update)
        self.kills.append(kill)
        with contextlib.suppress(ProcessLookupError):  # the run has just finished
            os.kill(self.watch.processes()[name], how)
        is_learner = name.startswith("learner")
        if not is_learner:
            at_s, _ = self._wait_for_update(kill.update + 1, f"an update without {name}")
            kill.next_update_s = at_s - now_s
        self._wait(lambda: self._num_joins(name) > joins, f"{name} joining again")
        base = self._resumed(num_lines) if is_learner else self._newest()["update"]
        at_s, record = self._wait_for_update(base + 1, f"an update with {name} again")
        kill.recovered_s = at_s - now_s
        if is_learner:
            kill.next_update_s = kill.recovered_s
            kill.updates_lost = kill.update - base
        before = self._dropped.get(base if is_learner else kill.update, 0)
        kill.tickets_lost = record["queue/dropped"] - before
        self.num_files.append(self.watch.num_files())
        print(f"{kill.at_s:6.0f} s  {row(kill)}", flush=True)

    def _resumed(self, num_lines: int) -> int:
        """Update from which the learner goes on, of lines after the first `num_lines`."""
        found = [re.search(r"continuing .* after update (\d+)", x) for x in self.lines[num_lines:]]
        updates = [int(match[1]) for match in found if match]
        return updates[-1] if updates else 0

    def _num_joins(self, name: str) -> int:
        """How often a process has begun to take part; the learner has when it goes on."""
        if name.startswith("learner"):
            return sum("continuing " in line for line in list(self.lines))
        log = (self.workdir / "logs" / "runtime.log").read_text()
        return len(re.findall(rf"{name} has joined session", log))

    def _newest(self) -> Record:
        """Of metrics.jsonl, of which only what is new is read: it is long in the end.

        A learner that goes on from a checkpoint makes it shorter.
        """
        try:
            with open(self.workdir / "metrics.jsonl", "rb") as file:
                if os.fstat(file.fileno()).st_size < self._num_read:
                    self._num_read, self._record = 0, _NO_RECORD
                file.seek(self._num_read)
                new = file.read()
        except FileNotFoundError:
            return self._record
        whole = new[: new.rfind(b"\n") + 1]  # a line may just be written
        self._num_read += len(whole)
        for line in whole.splitlines():
            self._record = json.loads(line)
            self._dropped[self._record["update"]] = self._record["queue/dropped"]
        return self._record

    def _wait_for_update(self, least: int, what: str) -> tuple[float, Record]:
        """The newest record once there is one of at least that update, and when it was seen."""
        self._wait(lambda: self._newest()["update"] >= least, what)
        return time.monotonic(), self._newest()

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + self.options.patience_s
        while not holds():
            if not self._is_alive():
                if self.process.returncode == 0:
                    raise _FinishedError
                raise SoakError(f"the run ended instead of {what}")
            if time.monotonic() > end_s:
                raise SoakError(f"{self.options.patience_s:g} s were too few for {what}")
            time.sleep(_POLL_S)


# ------------------------------------------------------------------------ what must hold


def checks(soak: Soak, code: int, left: Leftovers, evaluation: Record | None) -> list[Check]:
    """Of a run that has ended."""
    summary = json.loads((soak.workdir / "summary.json").read_text())
    records = soak.records()
    return [
        Check(what="exit code is 0 or 3", holds=code in (0, 3), found=str(code)),
        _only_the_killed_have_died(soak),
        *record_checks(records, summary),
        *(
            Check(what=f"no {what} is left", holds=not found, found=", ".join(found) or "none")
            for what, found in dataclasses.asdict(left).items()
        ),
        files_check(soak.num_files),
        *memory_checks(soak.watch.memory(), soak.options.max_growth),
        *([success_check(summary["evaluation_before"], evaluation)] if evaluation else []),
    ]


def _only_the_killed_have_died(soak: Soak) -> Check:
    died, killed = soak.watch.restarted(), sorted(kill.name for kill in soak.kills)
    return Check(
        what="only killed processes have died",
        holds=died == killed,
        found=f"{len(died)} died, {len(killed)} were killed",
    )


# ------------------------------------------------------------------------------- output


def evaluate(soak: Soak) -> Record | None:
    """Of the last checkpoint, in one process; None where the config has no episodes."""
    if json.loads((soak.workdir / "summary.json").read_text())["evaluation_before"] is None:
        return None
    command = soak.command("--job=evaluate", "--config.runtime.kind=local")
    subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=True)
    return json.loads((soak.workdir / "eval.json").read_text())


def report(soak: Soak, found: list[Check]) -> dict[str, Any]:
    """Everything, as JSON."""
    memory = [
        {"name": x.name, "span_s": x.span_s, "first_mib": x.rss_mib[0], "last_mib": x.rss_mib[-1]}
        | {"slope_mib_per_min": x.slope_mib_per_min(WARM_SHARE)}
        for x in soak.watch.memory()
        if x.times_s
    ]
    options = {name: str(value) for name, value in vars(soak.options).items()}
    return {
        "options": options,
        "updates": len(soak.records()),
        "kills": [dataclasses.asdict(kill) for kill in soak.kills],
        "by_kind": summary_rows(soak.kills),
        "memory": memory,
        "checks": [dataclasses.asdict(check) for check in found],
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options; those of the run are `overrides`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="after the first update")
    parser.add_argument("--config", default="configs/debug.py")
    parser.add_argument("--kind", default="processes", choices=("processes", "ray"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hangs", type=float, default=0.2, help="share of SIGSTOP, in [0, 1]")
    parser.add_argument("--pause_s", type=float, default=10.0, help="longest time between kills")
    parser.add_argument("--silence_s", type=float, default=15.0, help="runtime.silence_s")
    parser.add_argument("--patience_s", type=float, default=600.0, help="for one recovery")
    parser.add_argument("--num_updates", type=int, default=1_000_000, help="end of the run at last")
    parser.add_argument("--max_growth", type=float, default=8.0, help="MiB a minute")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--keep", type=pathlib.Path, help="new work directory, which is kept")
    options, overrides = parser.parse_known_args(arguments)
    wrong = [x for x in overrides if not x.startswith("--config.")]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    options.overrides = overrides
    return options


def main() -> None:
    """Soaks, prints, saves; exit code 1 when something does not hold."""
    options = parse(sys.argv[1:])
    with (
        tempfile.TemporaryDirectory(prefix="soak_") as own,
        tempfile.TemporaryDirectory(prefix="tmp_") as temporary,
    ):
        workdir = options.keep or pathlib.Path(own) / "run"
        if workdir.exists():
            raise SystemExit(f"--keep={workdir}: exists. Fix: --keep=NEW_DIRECTORY")
        soak = Soak(options, workdir.absolute(), pathlib.Path(temporary))
        print(f"{'':6}    {HEADER}", flush=True)
        try:
            code = soak.run()
            if not (soak.workdir / "summary.json").exists():
                raise SoakError(f"the run ended with exit code {code} and no summary")
            left = soak.watch.leftovers(wait_s=_END_S)
            found = checks(soak, code, left, evaluate(soak))
        except SoakError as error:
            print("\n".join(soak.lines[-30:]))
            found = [Check(what="the run goes on after every kill", holds=False, found=str(error))]
        finally:
            soak.close()
        show(soak.kills, found)
        if options.json:
            options.json.write_text(json.dumps(report(soak, found), indent=2) + "\n")
    raise SystemExit(0 if all(check.holds for check in found) else 1)


if __name__ == "__main__":
    main()
