"""What every weight store keeps account of: versions, who has swapped them in, what that cost."""

import threading
from collections.abc import Callable

from jaxvla.transport.base import WeightMetrics, WeightStore
from jaxvla.transport.weight_copy import spec_of
from jaxvla.types import Params


class Account:
    """What is known of a subscription. The lock of its store guards it."""

    def __init__(self, name: str):
        self.name = name
        self.pulled_version = -1
        """Newest version that the server may have in use."""
        self.acknowledged_version = -1


class AccountingStore(WeightStore):
    """The part of a weight store that does not depend on how weights travel.

    Args:
      on_acknowledged: called with the new `acknowledged_version` whenever it rises, without
        locks held, so that calls of two threads may overtake each other. Meant for
        `TrajectoryQueue.advance`.
      clock: monotonic seconds.
    """

    def __init__(
        self, on_acknowledged: Callable[[int], None] | None, clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self.changed = threading.Condition()
        """Guards everything below and in the accounts; never held while copying."""
        self.is_closed = False
        self._on_acknowledged = on_acknowledged
        self._accounts: dict[str, Account] = {}
        self._latest_version: int | None = None
        self._spec: dict[str, str] = {}
        self._acknowledged_version: int | None = None
        self._staged_s: dict[int, float] = {}
        """When each version above the acknowledged one was complete."""
        self._publish_ms = 0.0
        self._pull_ms = 0.0
        self._nbytes = 0

    @property
    def latest_version(self) -> int | None:
        """See `WeightStore.latest_version`."""
        with self.changed:
            return self._latest_version

    @property
    def acknowledged_version(self) -> int | None:
        """See `WeightStore.acknowledged_version`."""
        with self.changed:
            return self._acknowledged_version

    def wait_for(self, version: int, timeout_s: float | None = None) -> bool:
        """See `WeightStore.wait_for`."""

        def is_published() -> bool:
            return self._latest_version is not None and version <= self._latest_version

        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or is_published(), timeout_s)
            return is_published()

    def metrics(self) -> WeightMetrics:
        """See `WeightStore.metrics`."""
        with self.changed:
            return WeightMetrics(
                publish_ms=self._publish_ms, pull_ms=self._pull_ms, nbytes=self._nbytes
            )

    def lagging(self) -> list[tuple[str, int, float]]:
        """See `WeightStore.lagging`."""
        with self.changed:
            now_s, behind = self.clock(), []
            for account in self._accounts.values():
                in_use = account.acknowledged_version
                newer = [s for version, s in self._staged_s.items() if version > in_use]
                if newer:
                    behind.append((account.name, in_use, now_s - min(newer)))
            return behind

    def close(self) -> None:
        """See `WeightStore.close`."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def open_account(self, account: Account) -> None:
        """Adds a subscription.

        Raises:
          ValueError: the name is taken.
        """
        with self.changed:
            self._require_free(account.name)
            self._accounts[account.name] = account

    def is_current(self, version: int) -> bool:
        """Whether a version was published and is no older than what all servers have in use."""
        with self.changed:
            return version in self._staged_s or version == self._acknowledged_version

    def close_account(self, account: Account) -> None:
        """Waits for a subscription no longer. Closing twice changes nothing."""
        with self.changed:
            self._forget(account)
        self._settle()

    def acknowledge(self, account: Account, version: int) -> None:
        """Notes that a server has swapped a version in.

        Raises:
          ValueError: it has not pulled that version.
        """
        with self.changed:
            if version != account.pulled_version:
                raise ValueError(
                    f"{account.name} acknowledges version {version}, pulled "
                    f"{account.pulled_version}"
                )
            account.acknowledged_version = version
        self._settle()

    def _forget(self, account: Account) -> None:
        """Removes an account if it is there, with the lock held."""
        if self._accounts.get(account.name) is account:
            del self._accounts[account.name]
        self.changed.notify_all()

    def _require_free(self, name: str) -> None:
        if name in self._accounts:
            raise ValueError(f"a weight subscription named {name!r} is live")

    def _check(self, version: int, params: Params) -> None:
        """Refuses old versions and trees unlike the first, before anything is copied."""
        latest = self._latest_version
        if version < 0 or (latest is not None and version <= latest):
            raise ValueError(f"weights version {version} after {latest}")
        spec = spec_of(params)
        if latest is None:
            self._spec = spec
        for name in sorted(self._spec.keys() | spec.keys()):
            if self._spec.get(name) != spec.get(name):
                raise ValueError(
                    f"weights version {version}, leaf {name!r}: {spec.get(name, 'missing')}, but "
                    f"{self._spec.get(name, 'no such leaf')} in the first version"
                )

    def _published(self, version: int, *, start_s: float, nbytes: int) -> None:
        """Notes that a version is complete, with the lock held."""
        self._latest_version = version
        self._staged_s[version] = self.clock()
        self._publish_ms = 1e3 * (self._staged_s[version] - start_s)
        self._nbytes = nbytes
        self.changed.notify_all()

    def _settle(self) -> None:
        """Raises `acknowledged_version` to what all live subscriptions have swapped in.

        A newcomer that has swapped nothing in (-1) holds it where it is: what it will pull is
        at least that new, but may be older than what the others have by then.
        """
        with self.changed:
            swapped = [account.acknowledged_version for account in self._accounts.values()]
            version = min(swapped, default=-1)
            known = -1 if self._acknowledged_version is None else self._acknowledged_version
            if version <= known:
                return
            self._acknowledged_version = version
            self._pull_ms = 1e3 * (self.clock() - self._staged_s[version])
            self._staged_s = {v: t for v, t in self._staged_s.items() if v > version}
        if self._on_acknowledged is not None:
            self._on_acknowledged(version)
