"""Chooses the batcher's trigger and wait while it runs, from what it measures. No jax.

N closed-loop clients think (simulate) for Z seconds after an answer and then wait R seconds for
the next one, so the rows per second are X = rows of all clients / (Z + R): the interactive
response time law (Denning & Buzen 1978, https://doi.org/10.1145/356733.356735). Z is theirs;
only R depends on the batcher. Firing at once spares the requests at hand and costs those to
come, which wait for a server that is busy with few rows; holding back does the opposite. With
Poisson arrivals the optimum is a threshold on what waits (Deb & Serfozo 1973,
https://doi.org/10.2307/1426040). Here an arrival is an answer one think time later, and R has
no closed form. So R is not derived: the measured clients and server are replayed in virtual
time under each candidate trigger, and the one with the largest X is kept.

The wait is the age of the oldest request by which every client has asked, were each as slow as
it ever was of late: longest service + longest think. Below it the timer would overrule the
trigger, and can lock clients into a bad rhythm for good: one is served alone while the others
think, they together while it thinks. Above it the server would only wait for clients that hang.

Measured, as running windows:
  * think times per client, the last `_NUM_THINKS`, one by one: their spread and who is slow
    decide what waiting costs. A client that has thought more than `_HANGS` times as long as
    ever is left out until it asks: nobody should be held back for it;
  * service time per bucket, the median of the last `_NUM_SERVICES`, so that one hiccup changes
    nothing. A bucket that was never used counts with the least that the others allow (more rows
    take no less time, fewer rows no less time per row), so that it is tried if it could be best;
    one that was not used lately counts with no less than a smaller one that was.

The model takes clients for independent. Where they share what they think with, such as simulators
on the same devices, batches bring them into each other's way, and it is wrong. So predictions are
corrected by what triggers really came to:
  * rate, from one request of a client to the next while it stays: measured for the trigger in use
    and remembered for `_NUM_REMEMBERED` sweeps, as long as the clients are the same. It counts
    against the prediction by their variances, of which the latter's is an assumption;
  * an untried trigger is expected to miss its prediction by as much as the nearest tried one.

Only the kind that is asked for most is modelled. A replay costs a few microseconds a request.
One is made per N requests, in the server's thread between batches, on a snapshot; when the
sweep over the triggers is through, the setting changes, but for a predicted gain only. The same
observations in the same order give the same settings.
"""

import bisect
import heapq
import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_NUM_THINKS = 32
_NUM_SERVICES = 9
_FIRST_ROUNDS = 4
"""Requests per client before the first sweep."""
_REST_ROUNDS = 16
"""Requests per client between two sweeps."""
_TRIAL_ROUNDS = 4
"""The same after a change."""
_REPLAYED_ROUNDS = 12
"""Requests per client in a replay, beside `_REPLAYED_REQUESTS`."""
_REPLAYED_REQUESTS = 128
_HANGS = 2.0
_CLEARLY = 1.01
"""Gain in rate for which the trigger is changed."""
_NUM_REMEMBERED = 16
"""Sweeps after which the rate under another trigger than the present one is forgotten."""
_PREDICTION_ERROR = 0.1
"""Relative standard error of a prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """When a batch fires."""

    trigger_rows: int
    """Waiting rows that start a batch at once."""
    max_wait_s: float
    """Longest time that the oldest waiting request is held back; may be inf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Measured throughput."""

    rows_per_s: float
    error: float
    """Relative standard error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedLoop:
    """Clients and server as measured: all that a replay needs."""

    rows: tuple[int, ...]
    """Rows per request, of each client."""
    think_s: tuple[tuple[float, ...], ...]
    """Seconds from answer to next request, of each client; used in turn, over and over."""
    buckets: tuple[int, ...]
    """Batch sizes, ascending."""
    service_s: tuple[float, ...]
    """Seconds that a batch of each bucket takes."""
    max_rows: int
    """Rows per batch."""
    rate: "Rate | None" = None
    """Under the setting in use, since the snapshot before; None if too little is known."""

    @property
    def longest_wait_s(self) -> float:
        """Age of the oldest request by which all clients have asked, whatever the setting.

        It may come right after a batch began; those in the batch think after it has ended.
        """
        return max(self.service_s) + max(max(times) for times in self.think_s)


def replay(
    loop: ClosedLoop, setting: Setting, num_requests: int, *, stagger_s: float = 0.0
) -> float:
    """Rows per second that the batcher would serve under a setting, in virtual time.

    Follows the rules of `Batcher` for clients that ask for one kind, from the moment when all
    of them begin to think, one after the other. The first quarter of the requests is not counted.

    Args:
      loop: clients and server.
      setting: trigger and wait.
      num_requests: requests to replay, of all clients together; at least 4.
      stagger_s: every client begins so much later than the one before.
    """
    arrivals = [(times[0] + i * stagger_s, i) for i, times in enumerate(loop.think_s)]
    heapq.heapify(arrivals)
    num_thought = [1] * len(loop.rows)
    waiting: deque[tuple[float, int]] = deque()
    waiting_rows, num_done, counted_rows = 0, 0, 0
    now_s, start_s = 0.0, math.nan
    while num_done < num_requests:
        is_left_behind = bool(waiting)
        while True:
            while arrivals and arrivals[0][0] <= now_s:
                waiting.append(heapq.heappop(arrivals))
                waiting_rows += loop.rows[waiting[-1][1]]
            timer_s = waiting[0][0] + setting.max_wait_s if waiting else math.inf
            if waiting and (is_left_behind or waiting_rows >= setting.trigger_rows):
                break
            if now_s >= timer_s or not arrivals:
                break
            now_s = min(timer_s, arrivals[0][0])
        batch, rows = _fill(waiting, loop)
        waiting_rows -= rows
        now_s += loop.service_s[bisect.bisect_left(loop.buckets, rows)]
        if num_done >= num_requests // 4:
            counted_rows += rows
        else:
            start_s = now_s
        num_done += len(batch)
        for client in batch:
            times, count = loop.think_s[client], num_thought[client]
            heapq.heappush(arrivals, (now_s + times[count % len(times)], client))
            num_thought[client] = count + 1
    return counted_rows / (now_s - start_s)


def _fill(waiting: deque[tuple[float, int]], loop: ClosedLoop) -> tuple[list[int], int]:
    """Takes the clients of a batch out of the queue; also gives their rows."""
    batch: list[int] = []
    rows = 0
    while waiting and rows + loop.rows[waiting[0][1]] <= loop.max_rows:
        client = waiting.popleft()[1]
        batch.append(client)
        rows += loop.rows[client]
    return batch, rows


@dataclass(slots=True)
class _History:
    """What is known of one client's requests of one kind."""

    rows: int = 0
    """Of its latest request."""
    think_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_THINKS))


@dataclass(slots=True)
class _Cycles:
    """From one request of a client to the next one of the same kind."""

    count: int = 0
    total_s: float = 0.0
    squares_s: float = 0.0
    """Sum of squares."""

    def add(self, span_s: float) -> None:
        """One more."""
        self.count += 1
        self.total_s += span_s
        self.squares_s += span_s * span_s


def _rate(rows: Sequence[int], cycles: Sequence[_Cycles]) -> Rate | None:
    """Of clients with so many rows per request, whose cycles vary independently; None unless each
    of them has two."""
    if min(x.count for x in cycles) < 2:
        return None
    rows_per_s = [r * x.count / x.total_s for r, x in zip(rows, cycles, strict=True)]
    # Relative variance of the mean of n cycles: (n sum of squares / (sum)^2 - 1) / (n - 1).
    variances = [
        max(0.0, x.count * x.squares_s / x.total_s**2 - 1.0) / (x.count - 1) for x in cycles
    ]
    total = sum(rows_per_s)
    variance = sum(r * r * v for r, v in zip(rows_per_s, variances, strict=True))
    return Rate(rows_per_s=total, error=math.sqrt(variance) / total)


@dataclass(slots=True)
class _Services:
    """Batches of one kind in one bucket."""

    last_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_SERVICES))
    """Seconds of each."""
    newest_s: float = -math.inf
    """When the latest one ended."""


@dataclass(slots=True)
class _Running:
    """The batch that is being served."""

    kind: str
    rows: int
    clients: set[str]
    """Those of its clients that have not asked again."""
    fired_s: float


class Measurements:
    """Think and service times. Not thread-safe: the batcher calls it with its lock held.

    A batch is in service from its firing until the server comes back for the next one; an
    answer counts from then on.
    """

    def __init__(self, buckets: Sequence[int], max_rows: int):
        self._buckets = tuple(buckets)
        self._max_rows = max_rows
        self._histories: dict[str, dict[str, _History]] = {}
        """By kind, by client."""
        self._services: dict[str, dict[int, _Services]] = {}
        """By kind, by index of the bucket."""
        self._answered_s: dict[str, float] = {}
        """When each client that thinks now was answered."""
        self._present: set[str] = set()
        """Live clients, and those that left after the latest snapshot."""
        self._live: set[str] = set()
        self._running: _Running | None = None
        self._num_asked: Counter[str] = Counter()
        """Requests by kind."""
        self._asked_s: dict[str, tuple[str, float]] = {}
        """Kind and time of each client's latest request, while it stays."""
        self._cycles: dict[str, dict[str, _Cycles]] = {}
        """By kind, by client; since the latest snapshot."""

    @property
    def num_asked(self) -> int:
        """Requests so far."""
        return self._num_asked.total()

    @property
    def num_clients(self) -> int:
        """Clients that are present."""
        return len(self._present)

    def joined(self, client: str) -> None:
        """A client is live from now on."""
        self._live.add(client)
        self._present.add(client)

    def left(self, client: str) -> None:
        """A client is gone, for a while or for good; what it does meanwhile is not thinking."""
        self._live.discard(client)
        self._answered_s.pop(client, None)
        self._asked_s.pop(client, None)
        if self._running is not None:
            self._running.clients.discard(client)

    def asked(self, client: str, *, rows: int, kind: str, now_s: float) -> None:
        """A request has come."""
        self._num_asked[kind] += 1
        history = self._histories.setdefault(kind, {}).setdefault(client, _History())
        history.rows = rows
        last_kind, last_s = self._asked_s.get(client, ("", now_s))
        if last_kind == kind and now_s > last_s:
            self._cycles.setdefault(kind, {}).setdefault(client, _Cycles()).add(now_s - last_s)
        self._asked_s[client] = kind, now_s
        if self._running is not None and client in self._running.clients:
            self._running.clients.remove(client)  # faster than the server came back
            history.think_s.append(0.0)
        elif client in self._answered_s:
            history.think_s.append(now_s - self._answered_s.pop(client))

    def fired(self, *, kind: str, rows: int, clients: Iterable[str], now_s: float) -> None:
        """A batch begins."""
        self._running = _Running(kind, rows, self._live.intersection(clients), now_s)

    def finished(self, now_s: float) -> None:
        """The server is back, its batch answered. Without a batch nothing happens."""
        running, self._running = self._running, None
        if running is None:
            return
        bucket = bisect.bisect_left(self._buckets, running.rows)
        services = self._services.setdefault(running.kind, {}).setdefault(bucket, _Services())
        services.last_s.append(now_s - running.fired_s)
        services.newest_s = now_s
        self._answered_s.update(dict.fromkeys(running.clients, now_s))

    def setting_changed(self) -> None:
        """What was measured of the rate belongs to another setting."""
        self._asked_s.clear()
        self._cycles.clear()

    def snapshot(self, now_s: float) -> ClosedLoop | None:
        """The closed loop of the kind that is asked for most; None before there is any."""
        present, self._present = self._present, set(self._live)
        kind = max(self._num_asked, key=self._num_asked.__getitem__, default="")
        services = self._services.get(kind)
        histories = self._histories.get(kind, {})
        names = [
            name
            for name in sorted(present)
            if name in histories and self._is_known(name, histories[name], now_s)
        ]
        known = [histories[name] for name in names]
        cycles, self._cycles = self._cycles.get(kind, {}), {}
        if not known or not services:
            return None
        return ClosedLoop(
            rows=tuple(history.rows for history in known),
            think_s=tuple(tuple(history.think_s) for history in known),
            buckets=self._buckets,
            service_s=service_times(
                self._buckets,
                {i: (statistics.median(x.last_s), x.newest_s) for i, x in services.items()},
            ),
            max_rows=self._max_rows,
            rate=_rate([x.rows for x in known], [cycles.get(x, _Cycles()) for x in names]),
        )

    def _is_known(self, client: str, history: _History, now_s: float) -> bool:
        """Has asked twice, and does not seem to hang."""
        so_far_s = now_s - self._answered_s.get(client, now_s)
        return bool(history.think_s) and so_far_s <= _HANGS * max(history.think_s)


def service_times(
    buckets: Sequence[int], measured: Mapping[int, tuple[float, float]]
) -> tuple[float, ...]:
    """Service time of every bucket: measured, or the least that the measured ones allow.

    More rows take no less time, and fewer rows take no less time per row. Of two measurements
    that contradict the former, the server having changed, the newer one counts.

    Args:
      buckets: rows, ascending.
      measured: by index of the bucket, at least one: seconds, and when they were measured.
    """
    known_s = {
        i: max(s for j, (s, at_s) in measured.items() if j == i or (j < i and at_s > since_s))
        for i, (_, since_s) in measured.items()
    }
    return tuple(
        known_s[i]
        if i in known_s
        else max(s * min(1.0, rows / buckets[j]) for j, s in known_s.items())
        for i, rows in enumerate(buckets)
    )


def triggers(loop: ClosedLoop) -> list[int]:
    """Candidate triggers in rows, each of them what any k clients ask for at least.

    k goes from 1 to 8, then on in steps of a quarter, and up to all clients by ones.
    """
    count = len(loop.rows)
    rows = list(itertools.accumulate(sorted(loop.rows)))
    counts = {*range(1, min(8, count) + 1), *range(max(1, count - 2), count + 1)}
    step = 8.0
    while step < count:
        counts.add(round(step))
        step *= 1.25
    return sorted({min(loop.max_rows, rows[k - 1]) for k in counts})


def sweep(
    loop: ClosedLoop,
    present: Setting,
    longest_wait_s: float,
    measured: Mapping[int, Rate] | None = None,
) -> Generator[None, None, Setting]:
    """Replays the candidates, one per step, and returns the setting to use.

    Args:
      loop: clients and server.
      present: setting in use.
      longest_wait_s: limit on the wait.
      measured: by trigger, of these clients.
    """
    num_requests = _REPLAYED_ROUNDS * len(loop.rows) + _REPLAYED_REQUESTS
    wait_s = min(longest_wait_s, loop.longest_wait_s)
    # Clients that take equally long and begin together stay together under any trigger, while the
    # real ones may be stuck in turns. What brings them together again must do so in the replay.
    stagger_s = max(loop.service_s) / len(loop.rows)
    rates: dict[int, float] = {}
    for trigger in sorted({present.trigger_rows, *triggers(loop)}):
        setting = Setting(trigger_rows=trigger, max_wait_s=wait_s)
        rates[trigger] = replay(loop, setting, num_requests, stagger_s=stagger_s)
        yield
    rates = corrected_rates(rates, measured or {})
    best = max(rates, key=rates.__getitem__)
    # Above the rows of these clients the trigger would be for one that hangs.
    kept = min(present.trigger_rows, max(triggers(loop)))
    if rates[best] <= _CLEARLY * rates[kept]:
        best = kept
    return Setting(trigger_rows=best, max_wait_s=wait_s)


def corrected_rates(
    predicted: Mapping[int, float], measured: Mapping[int, Rate]
) -> dict[int, float]:
    """Predicted rates by trigger, drawn towards the measured ones; what was not measured misses its
    prediction by as much as the nearest trigger that was."""
    misses = {
        trigger: _PREDICTION_ERROR**2
        / (_PREDICTION_ERROR**2 + rate.error**2)
        * (rate.rows_per_s / predicted[trigger] - 1.0)
        for trigger, rate in measured.items()
        if trigger in predicted
    }
    if not misses:
        return dict(predicted)
    nearest = {t: min(misses, key=lambda other: abs(other - t)) for t in predicted}
    return {t: (1.0 + misses[nearest[t]]) * rate for t, rate in predicted.items()}


class Tuner:
    """Watches a batcher and tells it its setting. See the module docstring.

    Args:
      buckets: compiled batch sizes in rows, ascending, the last one at least `max_rows`.
      max_rows: rows per batch.
      longest_wait_s: limit on the wait that it chooses.

    Raises:
      ValueError: the buckets do not ascend, or do not hold a batch of `max_rows`.
    """

    def __init__(self, *, buckets: Sequence[int], max_rows: int, longest_wait_s: float = math.inf):
        if list(buckets) != sorted(set(buckets)) or not buckets or buckets[-1] < max_rows:
            raise ValueError(f"buckets {tuple(buckets)} must ascend and hold {max_rows} rows")
        self.measurements = Measurements(buckets, max_rows)
        """For the batcher, which guards it with its lock."""
        self._longest_wait_s = longest_wait_s
        self._sweep: Generator[None, None, Setting] | None = None
        self._round = 0
        """Requests of one per client."""
        self._next_step = 0
        """Requests after which the next replay is due."""
        self._num_sweeps = 0
        self._trigger_rows = 0
        """In use during the sweep."""
        self._rows: tuple[int, ...] = ()
        """Of the clients' requests, for whom `_measured` holds."""
        self._measured: dict[int, tuple[Rate, int]] = {}
        """By trigger, with the sweep before which that was."""

    def prepare(self, present: Setting, now_s: float) -> bool:
        """Whether `step` has something to do. The batcher holds its lock.

        Args:
          present: setting in use.
          now_s: clock reading.
        """
        seen, self._round = self.measurements, self.measurements.num_clients
        if seen.num_asked < max(self._next_step, _FIRST_ROUNDS * self._round):
            return False
        self._next_step = seen.num_asked + self._round
        if self._sweep is None:
            loop = seen.snapshot(now_s)
            if loop is not None:
                self._trigger_rows = present.trigger_rows
                measured = self._remember(loop)
                self._sweep = sweep(loop, present, self._longest_wait_s, measured)
        return self._sweep is not None

    def _remember(self, loop: ClosedLoop) -> dict[int, Rate]:
        """Notes what the present trigger came to; gives that of all triggers where it is known."""
        self._num_sweeps += 1
        oldest = self._num_sweeps - _NUM_REMEMBERED
        is_same = loop.rows == self._rows
        self._rows = loop.rows
        self._measured = {t: x for t, x in self._measured.items() if is_same and x[1] > oldest}
        if loop.rate is not None:
            self._measured[self._trigger_rows] = loop.rate, self._num_sweeps
        return {trigger: rate for trigger, (rate, _) in self._measured.items()}

    def step(self) -> Setting | None:
        """Makes one replay; gives a setting at the end of a sweep. No lock is needed."""
        assert self._sweep is not None, "step follows a prepare that said so"
        try:
            next(self._sweep)
        except StopIteration as end:
            self._sweep = None
            is_trial = end.value.trigger_rows != self._trigger_rows
            self._next_step += (_TRIAL_ROUNDS if is_trial else _REST_ROUNDS) * self._round
            return end.value
        return None
