"""The order of a sweep: every trial in turn, again and again, and what is left of it. No jax."""

import math
import pathlib
import statistics
import threading
from collections.abc import Callable, Sequence

from jaxvla.scaling.sweep_files import SweepBook
from jaxvla.scaling.sweep_plan import Trial
from jaxvla.scaling.sweep_results import THROUGHPUT, TrialResult
from jaxvla.scaling.trial_run import Measurement, SweepStoppedError, TrialFailedError
from jaxvla.telemetry.progress import format_duration, format_rate

RunTrial = Callable[[Trial, pathlib.Path], Measurement]
"""See `TrialRunner.run`."""


class Sweep:
    """Runs what sweep.json lacks."""

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        book: SweepBook,
        workdir: pathlib.Path,
        repeats: int,
        retry_failed: bool,
        run: RunTrial,
        say: Callable[[str], None],
        stop_requested: threading.Event,
    ):
        """Args:
        trials: in the order in which they take turns: A B C A B C, so that a machine that gets
          slower or busier in the course of a sweep favours none of them.
        book: results, also of earlier parts of the sweep.
        workdir: of the sweep; runs get directories of it.
        repeats: runs per trial.
        retry_failed: run again what has failed in an earlier part.
        run: one run.
        say: shows a line.
        stop_requested: set by signals.
        """
        self._trials = [(trial, book.result(TrialResult.of(trial))) for trial in trials]
        self._book = book
        self._workdir = workdir
        self._repeats = repeats
        self._run_trial = run
        self._say = say
        self._stop_requested = stop_requested
        if retry_failed:
            for _, result in self._trials:
                result.failed = None

    @property
    def results(self) -> list[TrialResult]:
        """Of the trials of this sweep."""
        return [result for _, result in self._trials]

    def run(self) -> bool:
        """Runs to the end; False when it was stopped. What has been run is in the files."""
        self._book.save()
        for number in range(self._repeats):
            for index, (trial, result) in enumerate(self._trials):
                if result.failed is not None or len(result.repeats) > number:
                    continue
                if self._stop_requested.is_set() or not self._run_one(trial, result, index):
                    return False
        return True

    def _run_one(self, trial: Trial, result: TrialResult, index: int) -> bool:
        """One run; False when it was stopped."""
        number = len(result.repeats) + 1
        try:
            directory = self._workdir / result.directory / f"repeat_{number}"
            measured = self._run_trial(trial, directory)
        except SweepStoppedError:
            return False
        except TrialFailedError as error:
            result.failed = str(error)
            outcome = f"failed: {error}"
        else:
            result.repeats.append(measured)
            speed, took = format_rate(measured[THROUGHPUT]), format_duration(measured["duration_s"])
            outcome = f"{speed} env steps/s | took {took}"
        self._book.save()
        where = f"trial {index + 1}/{len(self._trials)} repeat {number}/{self._repeats}"
        eta = format_duration(self.eta_s())
        self._say(f"{where} | {trial.title} | {outcome} | eta {eta}")
        return True

    def eta_s(self) -> float:
        """Seconds that the remaining runs take: each as long as the median of its trial's runs,
        or of all runs where it has none. NaN as long as nothing is known."""
        known = [run["duration_s"] for x in self.results for run in x.repeats]
        remaining_s = 0.0
        for result in self.results:
            left = self._repeats - len(result.repeats)
            if result.failed is not None or left <= 0:
                continue
            own = [run["duration_s"] for run in result.repeats] or known
            remaining_s += left * (statistics.median(own) if own else math.nan)
        return remaining_s
