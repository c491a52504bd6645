"""What tests of faults in tiny runs share."""

import pathlib
import time
from typing import Any

from runtime.tiny_run import Run

ENDS = ("finished", "shutdown")
"""Reasons for which tickets end at the end of any run."""


def lost(run: Run) -> int:
    """Trajectories given up for other reasons than the end of the run."""
    totals = run.summary()["totals"]
    reasons = {f"queue/dropped/{reason}" for reason in ENDS}
    return sum(
        count
        for name, count in totals.items()
        if name.startswith("queue/dropped/") and name not in reasons
    )


class TimedRun(Run):
    """Notes when updates were complete, in monotonic seconds."""

    def __init__(self, workdir: pathlib.Path, blueprint: Any):
        super().__init__(workdir, blueprint)
        self.update_times_s: list[float] = []
        self.screen.on_update = lambda record: self.update_times_s.append(time.monotonic())

    def recovery_s(self, fault_s: float) -> float:
        """Seconds from a moment to the next update."""
        return min(time_s for time_s in self.update_times_s if time_s >= fault_s) - fault_s
