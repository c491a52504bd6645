"""Success rates of an evaluation with their uncertainty."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from jaxvla.telemetry.metrics import Record

_Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(num_successes: int, num_episodes: int) -> tuple[float, float]:
    """Wilson 95 % score interval of a success probability.

    With n episodes, k successes, p = k / n and z the 97.5 % normal quantile, the bounds are
        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    It inverts the score test, so unlike p -+ z sqrt(p (1 - p) / n) it keeps its coverage for
    few episodes and has width at p = 0 and p = 1.
    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.

    Returns:
      (low, high), 0 <= low <= p <= high <= 1; low is 0 for k = 0 and high is 1 for k = n.

    Raises:
      ValueError: no episodes, or not 0 <= num_successes <= num_episodes.
    """
    n, k = num_episodes, num_successes
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} episodes have no success rate")
    p, z2 = k / n, _Z95**2
    center = p + z2 / (2 * n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (center - half) / (1 + z2 / n), (center + half) / (1 + z2 / n)
    # At the ends the two terms cancel exactly; floating point leaves 1e-17 outside [0, 1].
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuccessRate:
    """Successes counted over episodes."""

    num_successes: int
    num_episodes: int

    @property
    def rate(self) -> float:
        """Share of successes in [0, 1]; NaN without episodes."""
        return self.num_successes / self.num_episodes if self.num_episodes else math.nan

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson interval (low, high); (NaN, NaN) without episodes."""
        if not self.num_episodes:
            return math.nan, math.nan
        return wilson_interval(self.num_successes, self.num_episodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Success of one policy version."""

    overall: SuccessRate
    """Over all episodes, whatever their task."""
    per_task: dict[str, SuccessRate]
    """By task name, in the order of the env's tasks; tasks without episodes included."""

    def record(self) -> Record:
        """The contract's `eval/*` values."""
        low, high = self.overall.ci95
        return {
            "eval/success_rate": self.overall.rate,
            "eval/ci95_low": low,
            "eval/ci95_high": high,
            "eval/episodes": self.overall.num_episodes,
        } | {f"eval/success_rate/{task}": rate.rate for task, rate in self.per_task.items()}


def table(results: Mapping[str, EvaluationResult]) -> list[str]:
    """Plain text lines: a header, one line a task, the total.

    Args:
      results: of the same tasks by env; each has columns of its own.
    """
    first, *_ = results.values()
    names = [*first.per_task, "all tasks"]
    width = max(len(name) for name in names)
    lines = [f"{'task':<{width}}" + "".join(f"  {env:>33}" for env in results)]
    lines.append(" " * width + "  episodes  success   95 % interval" * len(results))
    for row, name in enumerate(names):
        cells = [[*result.per_task.values(), result.overall][row] for result in results.values()]
        lines.append(f"{name:<{width}}" + "".join(_cell(cell) for cell in cells))
    return lines


def _cell(success: SuccessRate) -> str:
    low, high = success.ci95
    interval = f"[{low:.3f}, {high:.3f}]"
    return f"  {success.num_episodes:8d}  {success.rate:7.3f}  {interval:>14}"


def summarise(
    *, tasks: Sequence[str], task_ids: np.ndarray, successes: np.ndarray
) -> EvaluationResult:
    """Counts the episodes of an evaluation.

    Args:
      tasks: task names, index = task id.
      task_ids: integer [n], task of each episode.
      successes: bool [n].

    Raises:
      ValueError: the arrays do not match, `successes` is not bool, a task id has no name or
        two tasks share one.
    """
    task_ids, successes = np.asarray(task_ids), np.asarray(successes)
    if task_ids.shape != successes.shape or task_ids.ndim != 1:
        raise ValueError(f"task ids {task_ids.shape} and successes {successes.shape}, want [n]")
    if successes.dtype != np.bool_:
        raise ValueError(f"successes are {successes.dtype}, want bool")
    if task_ids.size and not 0 <= task_ids.min() <= task_ids.max() < len(tasks):
        raise ValueError(f"task ids {set(task_ids.tolist())} for {len(tasks)} tasks")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"task names repeat: {', '.join(tasks)}")
    per_task = {name: _count(successes[task_ids == i]) for i, name in enumerate(tasks)}
    return EvaluationResult(overall=_count(successes), per_task=per_task)


def _count(successes: np.ndarray) -> SuccessRate:
    """Success rate of bool [n]."""
    return SuccessRate(num_successes=int(successes.sum()), num_episodes=successes.size)
