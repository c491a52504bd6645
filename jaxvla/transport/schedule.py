"""Record and replay of all that timing decides in a run. No jax.

With a fixed seed, the numbers of an asynchronous run still depend on who came first. The
programs ask a `Schedule` wherever that matters: the plain one says "whoever comes first", a
`ScheduleRecorder` writes down who that was, and a `ScheduleReplay` waits for the recorded one.

What is recorded is a line each, in the one order in which it happened, by whose lock it happens
under (the queue's, the store's, the router's) or in whose thread (the server's):

  admit   a ticket goes to an owner                 order of admission, and so of consumption
  take    the learner takes trajectories            matters with a window > 1
  join    a client gets a server; leave: it is done matters with greedy assignment
  swap    a server swaps a version in               credit for admissions, weights of batches
  batch   a server runs requests with a version     order of the rows, bucket, weights
  fail, restart                                     make a recording useless for replay

A client has one request at a time, so its n-th request is the n-th of its name in batches;
requests that were turned away and asked again count once. Envs, keys and optimizer steps are
functions of the seed and of these, and evaluation asks no policy server.

Why a replay cannot deadlock. It follows the recorded order at every place (queue, learner,
server, client), but not between places. Let e be the first recorded line that has not
happened again, and suppose that nothing moves. What e waits for happened before e in the
recording, because a line is written before its effects can be seen (a ticket is returned, an
answer given, a version acknowledged), and so has happened again, or follows without waiting:
  * admit: as many tickets were admitted before it as then, none failed, and servers have
    swapped in what they had: the credit is there. Its owner, closed-loop, asks for it.
  * take: its trajectories' batches have run. Tickets that became ready since only widen the
    window.
  * swap: the version is published, and kept, as the server has polled no newer one.
  * batch: its clients have joined this server, and got the answers before it.
What lies behind e and has happened already takes nothing of this away: credit, published
versions and waiting requests only grow until e uses them. So e happens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxvla.transport.base import Ticket


class ScheduleDivergedError(RuntimeError):
    """A replay asks for something other than the recorded run did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A batch that a policy server runs."""

    kind: str
    """Which function."""
    version: int
    """Of the weights."""
    requests: tuple[tuple[str, int], ...]
    """(client, rows) in order of the rows."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Who asked, in order."""
        return tuple(client for client, _ in self.requests)


class ServerSchedule:
    """One policy server's part of a schedule, for its thread. This one leaves all to timing."""

    is_replay = False
    """`pick` decides about batches, and weights are kept until `pull` asks for them."""

    def pull(self, staged: Collection[int]) -> int | None:
        """Which of the staged versions is swapped in now, if any. Here: the newest."""
        return max(staged, default=None)

    def pick(self, clients: Collection[str]) -> Sequence[str]:
        """In a replay, whose requests make the next batch; none unless all of them wait."""
        raise NotImplementedError(f"{type(self).__name__} knows no batches for {clients}")

    def running(self, served: Served) -> None:
        """A batch is about to be run."""


class Schedule:
    """What the programs ask and tell. This one leaves everything to timing.

    Calls of one method come one after the other for the same place (see the module docstring).
    """

    is_replay = False
    """Nothing may depend on the clock: no lease, no deadline, no timer."""

    def server(self, name: str) -> ServerSchedule:
        """The part of a policy server; always the same one for a name."""
        return ServerSchedule()

    def may_admit(self, owner: str, *, is_first: bool) -> bool:
        """Whether the next ticket is for `owner`. Here: if it is first in line."""
        return is_first

    def admitted(self, ticket: Ticket) -> None:
        """A ticket was given out."""

    def failed(self, ticket: Ticket, reason: str) -> None:
        """A ticket was given up."""

    def next_take(self, count: int) -> Sequence[int] | None:
        """Ids of the tickets that the next take must return; None: by the order rule."""
        return None

    def taken(self, ticket_ids: Sequence[int]) -> None:
        """The learner took these."""

    def joined(self, client: str, server: int) -> int:
        """Which server a client gets that would get `server` now."""
        return server

    def asked(self, client: str, kind: str, rows: int) -> None:
        """A client asks its server."""

    def left(self, client: str) -> None:
        """A client leaves its server."""

    def restarted(self, what: str) -> None:
        """Something was lost and started again."""

    def ended(self) -> None:
        """The run closes its queue: what follows is not part of it."""

    def num_updates(self, planned: int) -> int:
        """How many of the planned updates to make."""
        return planned

    def close(self) -> None:
        """Frees the file."""


FREE, FREE_SERVER = Schedule(), ServerSchedule()
"""Of ordinary runs."""
