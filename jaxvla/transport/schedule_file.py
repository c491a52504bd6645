"""Files of schedules: JSON lines, a header and one line per event of `transport.schedule`. No jax.

{"format": 1, "num_updates": 50, "settings": {"seed": 0, ...}}
{"admit": "group_0", "ticket": 0}
{"take": [0, 1]}                                               ticket ids
{"join": "group_0", "server": 1}            {"leave": "group_0"}
{"swap": 3, "server": "server_1"}                              weight version
{"batch": [["group_0", 17, 4]], "kind": "explore", "version": 3, "server": "server_1"}
                                                               client, its n-th request, rows
{"fail": 5, "owner": "group_0", "reason": "lease"}             a ticket
{"restart": "..."}
"""

import functools
import json
import operator
import pathlib
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxvla.config import ExperimentConfig, UsageError, field_names, to_dict
from jaxvla.transport.base import Ticket
from jaxvla.transport.schedule import Schedule, ScheduleDivergedError, Served, ServerSchedule

FORMAT = 1
"""Version of the file format."""

_INCIDENTAL = (
    "name",
    "evaluation.",
    "checkpoint.",
    "telemetry.",
    "runtime.grace_s",
    "runtime.compilation_cache",
)
"""Settings, or beginnings of their names, that change no loss."""


def settings_of(config: ExperimentConfig) -> dict[str, Any]:
    """Setting -> value, as JSON has it, of all settings that can change a loss.

    Args:
      config: resolved.
    """
    values = to_dict(config)
    wanted = [name for name in field_names(config) if not name.startswith(_INCIDENTAL)]
    found = {name: functools.reduce(operator.getitem, name.split("."), values) for name in wanted}
    return json.loads(json.dumps(found))


# ------------------------------------------------------------------------------ record


class ScheduleRecorder(Schedule):
    """Writes a line per event, at once: a killed run leaves what it did so far."""

    def __init__(self, path: pathlib.Path, config: ExperimentConfig):
        """Args:
        path: a new file.
        config: resolved.

        Raises:
          OSError: the file cannot be made, or is there already.
        """
        self._lock = threading.Lock()
        self._is_over = False
        self._num_served: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", encoding="utf-8")
        self._note(
            format=FORMAT, num_updates=config.learning.num_updates, settings=settings_of(config)
        )

    def server(self, name: str) -> ServerSchedule:
        """See `Schedule.server`."""
        return _ServerRecorder(self, name)

    def admitted(self, ticket: Ticket) -> None:
        """See `Schedule.admitted`."""
        self._note(admit=ticket.owner, ticket=ticket.id)

    def failed(self, ticket: Ticket, reason: str) -> None:
        """See `Schedule.failed`."""
        self._note(fail=ticket.id, owner=ticket.owner, reason=reason)

    def taken(self, ticket_ids: Sequence[int]) -> None:
        """See `Schedule.taken`."""
        self._note(take=list(ticket_ids))

    def joined(self, client: str, server: int) -> int:
        """See `Schedule.joined`."""
        self._note(join=client, server=server)
        return server

    def left(self, client: str) -> None:
        """See `Schedule.left`."""
        self._note(leave=client)

    def restarted(self, what: str) -> None:
        """See `Schedule.restarted`."""
        self._note(restart=what)

    def swapped(self, server: str, version: int) -> None:
        """A server swaps in a version."""
        self._note(swap=version, server=server)

    def served(self, server: str, served: Served) -> None:
        """A server runs a batch."""
        requests = [(name, self._num_served[name], rows) for name, rows in served.requests]
        self._num_served.update(served.clients)  # no other batch can hold one of these clients
        self._note(batch=requests, kind=served.kind, version=served.version, server=server)

    def ended(self) -> None:
        """See `Schedule.ended`."""
        with self._lock:
            self._is_over = True

    def close(self) -> None:
        """See `Schedule.close`."""
        with self._lock:
            self._is_over = True
            self._file.close()

    def _note(self, **event: Any) -> None:
        with self._lock:
            if not self._is_over:
                self._file.write(json.dumps(event) + "\n")
                self._file.flush()


class _ServerRecorder(ServerSchedule):
    """See `ScheduleRecorder`."""

    def __init__(self, recorder: ScheduleRecorder, name: str):
        self._recorder = recorder
        self._name = name

    def pull(self, staged: Collection[int]) -> int | None:
        version = super().pull(staged)
        if version is not None:
            self._recorder.swapped(self._name, version)
        return version

    def running(self, served: Served) -> None:
        self._recorder.served(self._name, served)


# ------------------------------------------------------------------------------ replay


class ScheduleReplay(Schedule):
    """Does what a file says, in its order at every place. At its end everybody waits.

    A recording that was cut short replays up to its last complete update.
    """

    is_replay = True

    def __init__(self, path: pathlib.Path):
        """Reads a whole file.

        Raises:
          UsageError: it is not there, is damaged, or is of a run that cannot be replayed.
        """
        self._path = path
        self._owners: deque[str] = deque()
        self._takes: deque[list[int]] = deque()
        self._joins: defaultdict[str, deque[int]] = defaultdict(deque)
        self._steps: defaultdict[str, deque[str]] = defaultdict(deque)
        """What each client does, in words."""
        self._num_served: Counter[str] = Counter()
        self._servers: defaultdict[str, _ServerReplay] = defaultdict(_ServerReplay)
        self._is_over = False
        lines = self._lines()
        self._settings = self._header(lines[0]) if lines else {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                self._read(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, UsageError):
                    raise
                raise self._refusal(f"line {number} is damaged", "record anew") from error
        per_update = self._settings.get("learning.trajectories_per_update", 1)
        self._num_updates = sum(map(len, self._takes)) // per_update
        if not self._num_updates:
            raise self._refusal("it holds no complete update", "record a longer run")

    def require(self, config: ExperimentConfig) -> None:
        """Refuses a config whose run would be another one than the recorded.

        Args:
          config: resolved.

        Raises:
          UsageError: it names the settings that differ.
        """
        ours, theirs = settings_of(config), self._settings
        names = sorted(x for x in ours.keys() | theirs.keys() if ours.get(x) != theirs.get(x))
        if names:
            differences = "; ".join(
                f"config.{x} = {ours.get(x)!r}, recorded with {theirs.get(x)!r}" for x in names[:3]
            )
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise self._refusal(differences + more, "the config and seed of the recording")

    def num_updates(self, planned: int) -> int:
        """See `Schedule.num_updates`: those of which the file holds everything."""
        return min(planned, self._num_updates)

    def server(self, name: str) -> ServerSchedule:
        """See `Schedule.server`."""
        server = self._servers[name]
        server.name = name
        return server

    def may_admit(self, owner: str, *, is_first: bool) -> bool:
        """See `Schedule.may_admit`."""
        return bool(self._owners) and self._owners[0] == owner

    def admitted(self, ticket: Ticket) -> None:
        """See `Schedule.admitted`."""
        self._owners.popleft()

    def failed(self, ticket: Ticket, reason: str) -> None:
        """See `Schedule.failed`. Whoever gave it up ends the run."""
        self._is_over = True

    def next_take(self, count: int) -> Sequence[int]:
        """See `Schedule.next_take`."""
        recorded = self._takes[0] if self._takes else []
        if len(recorded) != count:
            raise self._diverged(f"the learner takes {count} trajectories", f"tickets {recorded}")
        return recorded

    def taken(self, ticket_ids: Sequence[int]) -> None:
        """See `Schedule.taken`."""
        self._takes.popleft()

    def joined(self, client: str, server: int) -> int:
        """See `Schedule.joined`. After the end any server will do: none will answer."""
        joins = self._joins[client]
        return joins.popleft() if joins else server

    def asked(self, client: str, kind: str, rows: int) -> None:
        """See `Schedule.asked`."""
        self._expect(client, _asks(kind, rows))

    def left(self, client: str) -> None:
        """See `Schedule.left`."""
        self._expect(client, _LEAVES)

    def restarted(self, what: str) -> None:
        """See `Schedule.restarted`."""
        raise self._diverged(f"restarted {what}", "no restart")

    def ended(self) -> None:
        """See `Schedule.ended`."""
        self._is_over = True

    def _expect(self, client: str, step: str) -> None:
        """A client does something; its thread is the only one to say so."""
        steps = self._steps[client]
        if self._is_over or not steps:
            return
        recorded = steps.popleft()
        if recorded != step:
            raise self._diverged(f"{client} {step}", f"{client} {recorded}")

    def _diverged(self, actual: str, recorded: str) -> ScheduleDivergedError:
        return ScheduleDivergedError(f"{actual}; {self._path} has: {recorded}")

    def _refusal(self, problem: str, fix: str) -> UsageError:
        return UsageError(f"--replay_schedule={self._path}: {problem}. Fix: {fix}")

    def _lines(self) -> list[str]:
        """All whole lines: a killed recorder may leave part of one behind the last."""
        try:
            return self._path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise self._refusal(
                f"cannot be read, {error}", "a file of --record_schedule"
            ) from error

    def _header(self, line: str) -> dict[str, Any]:
        """The settings in the first line."""
        fix = "a file of --record_schedule"
        try:
            header = json.loads(line)
            version, settings = header["format"], dict(header["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._refusal("is no schedule", fix) from error
        if version != FORMAT:
            raise self._refusal(f"has format {version}, this version reads {FORMAT}", fix)
        return settings

    def _read(self, event: Mapping[str, Any]) -> None:
        """Sorts a line into the places that it concerns."""
        match event:
            case {"admit": owner, "ticket": ticket} if ticket == len(self._owners):
                self._owners.append(owner)
            case {"take": ids}:
                self._takes.append(ids)
            case {"join": client, "server": server}:
                self._joins[client].append(server)
            case {"leave": client}:
                self._steps[client].append(_LEAVES)
            case {"swap": version, "server": server}:
                self._servers[server].events.append(version)
            case {"batch": requests, "kind": kind, "version": version, "server": server}:
                self._read_batch(server, kind, version, requests)
            case {"fail": ticket, "owner": owner, "reason": reason}:
                raise self._refusal(
                    f"ticket {ticket} of {owner} failed in the recorded run, reason {reason!r}",
                    "record a run without failures",
                )
            case {"restart": what}:
                raise self._refusal(
                    f"the recorded run restarted {what}", "record a run without failures"
                )
            case _:
                raise ValueError(f"no event of a schedule: {event}")

    def _read_batch(
        self, server: str, kind: str, version: int, requests: list[tuple[str, int, int]]
    ) -> None:
        for client, number, rows in requests:
            if number != self._num_served[client]:
                raise ValueError(f"request {number} of {client}, want {self._num_served[client]}")
            self._num_served[client] += 1
            self._steps[client].append(_asks(kind, rows))
        asked = tuple((client, rows) for client, _, rows in requests)
        served = Served(kind=kind, version=version, requests=asked)
        self._servers[server].events.append(served)


_LEAVES = "leaves its server"


def _asks(kind: str, rows: int) -> str:
    return f"asks for {kind!r} of {rows} rows"


class _ServerReplay(ServerSchedule):
    """See `ScheduleReplay`."""

    is_replay = True

    def __init__(self) -> None:
        self.name = ""
        self.events: deque[int | Served] = deque()
        """Versions to swap in and batches to run, in order."""

    def pull(self, staged: Collection[int]) -> int | None:
        if not self.events or self.events[0] not in staged:
            return None
        version = self.events.popleft()
        assert isinstance(version, int), "staged versions are numbers"
        return version

    def pick(self, clients: Collection[str]) -> Sequence[str]:
        batch = self.events[0] if self.events else None
        if not isinstance(batch, Served) or not set(batch.clients) <= set(clients):
            return ()
        return batch.clients

    def running(self, served: Served) -> None:
        recorded = self.events.popleft()
        if served != recorded:
            raise ScheduleDivergedError(f"{self.name} runs {served}; recorded: {recorded}")
