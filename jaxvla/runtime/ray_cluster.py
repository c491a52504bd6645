"""Processes of a run as Ray actors: where they run, and what is reserved for them.

One actor for each, which does nothing but be that process: Ray places it, starts it and tells
when it has died. Everything else goes through connections of our own (docs/decisions/0014).
"""

import contextlib
import importlib.util
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from jaxvla.cluster import parse_resources
from jaxvla.config import ConfigError, RuntimeConfig, override
from jaxvla.runtime.launch import Launched
from jaxvla.runtime.replica_spec import ReplicaSpec, resource_field

_LOG = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 600.0
"""For the cluster to have what a placement group asks for; autoscalers start machines for it."""
_END_WAIT_S = 10.0
"""For processes of a cluster of our own to be gone after it was shut down."""


def check_ray(settings: RuntimeConfig) -> None:
    """Raises ConfigError when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        fix = "pip install jaxvla[ray], or " + override("runtime.kind", "processes")
        raise ConfigError("runtime.kind", settings.kind, "Ray is not installed", fix)


def node_address() -> str:
    """That Ray knows this machine by. In a process of a cluster."""
    import ray.util

    return ray.util.get_node_ip_address()


class RayLauncher:
    """Actors of a Ray cluster. Implements Launcher."""

    def __init__(self, settings: RuntimeConfig, kinds: Sequence[str]):
        """Connects to the cluster, or starts one on this machine.

        Args:
          settings: address, resources and placement.
          kinds: of all processes of the run, a bundle each of the placement group.

        Raises:
          ConfigError: there is no cluster at the address, or it never has what is asked for.
        """
        import ray

        self._ray = ray
        self._settings = settings
        self._processes: list[psutil.Process] = []
        """Of actors of a cluster of our own, so on this machine."""
        self._is_connected_here = not ray.is_initialized()
        if self._is_connected_here:
            with _keeping_handler(signal.SIGTERM):
                _init(ray, settings)
        self._group, self._bundles = None, _bundle_places(kinds)
        if settings.placement:
            self._group = self._make_group(kinds)

    def launch(self, spec: ReplicaSpec, on_end: Callable[[str], None]) -> Launched:
        """See `Launcher.launch`."""
        actor = self._ray.remote(_ReplicaActor).options(**self._options(spec)).remote()
        return _Actor(self._ray, actor, spec, on_end, self._started)

    def close(self) -> None:
        """See `Launcher.close`. A cluster that was there before stays."""
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        if not self._is_connected_here:
            return
        self._ray.shutdown()
        # Ray's own shutdown waits for its daemons, not for the processes of actors.
        for process in psutil.wait_procs(self._processes, timeout=_END_WAIT_S)[1]:
            process.kill()

    def _started(self, process_id: int) -> None:
        """An actor, in this process of its machine."""
        if not self._settings.address:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
                self._processes.append(psutil.Process(process_id))

    def _options(self, spec: ReplicaSpec) -> dict[str, Any]:
        """Of the actor: what it reserves, and where."""
        options: dict[str, Any] = _reserved(self._settings, spec.kind, spec.index)
        # The supervisor starts it again, with another spec; two restarters would fight.
        options |= {"max_restarts": 0, "max_concurrency": 1}
        if self._group is not None:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._group,
                placement_group_bundle_index=self._bundles[spec.kind] + spec.index,
            )
        return options

    def _make_group(self, kinds: Sequence[str]) -> Any:
        bundles = [
            _amounts(self._settings, kind, place - self._bundles[kind]) or {"CPU": 0.001}
            for place, kind in enumerate(kinds)
        ]
        group = self._ray.util.placement_group(bundles, strategy=self._settings.placement)
        if not group.wait(PLACEMENT_TIMEOUT_S):
            self._ray.util.remove_placement_group(group)
            placement = self._settings.placement
            raise ConfigError(
                "runtime.placement",
                placement,
                f"the cluster did not have {bundles} within {PLACEMENT_TIMEOUT_S:g} s",
                "ask for less in runtime.*_resources",
            )
        return group


class _ReplicaActor:
    """Is the process that a spec says."""

    def process_id(self) -> int:
        """On its machine."""
        return os.getpid()

    def run(self, spec: str) -> None:
        """Until it ends."""
        # Not at the top: the process settings have to be made before jax is imported.
        from jaxvla.runtime.replica import run

        run(ReplicaSpec.from_json(spec))


class _Actor:
    """An actor and the thread that waits for its end."""

    def __init__(
        self,
        ray: Any,
        actor: Any,
        spec: ReplicaSpec,
        on_end: Callable[[str], None],
        on_start: Callable[[int], None],
    ):
        self._ray = ray
        self._actor = actor
        self._on_end = on_end
        self._on_start = on_start
        self._process_id = actor.process_id.remote()
        self._result = actor.run.remote(spec.to_json())
        threading.Thread(target=self._wait, name=f"runtime/{spec.name}", daemon=True).start()

    def kill(self) -> None:
        """See `Launched.kill`."""
        self._ray.kill(self._actor, no_restart=True)

    def _wait(self) -> None:
        try:
            self._on_start(self._ray.get(self._process_id))
            self._ray.get(self._result)
            how = "its actor has returned"
        except Exception as error:  # of Ray, or of the process: either way it has ended
            how = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        self._ray.kill(self._actor, no_restart=True)
        self._on_end(how)


@contextlib.contextmanager
def _keeping_handler(number: int) -> Iterator[None]:
    """Puts the handler of a signal back that the block replaces: Ray's exits without a checkpoint.

    Only callable from the main thread.
    """
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, handler)


def _init(ray: Any, settings: RuntimeConfig) -> None:
    """A connection to a cluster, or one of our own that only this machine reaches."""
    if not settings.address:
        with warnings.catch_warnings():
            # JAX warns of forks. Ray's are followed by an exec at once, which is safe.
            warnings.filterwarnings("ignore", message=r"os\.fork", category=RuntimeWarning)
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                # Ray's default, 15, is for machines that other people work on.
                _system_config={"worker_niceness": 0},
            )
        return
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "runtime.address",
            settings.address,
            f"there is no Ray cluster: {error}",
            "ray start --head, or " + override("runtime.address", ""),
        ) from error


def _amounts(settings: RuntimeConfig, kind: str, index: int) -> dict[str, float]:
    """Ray resources of a process."""
    return parse_resources(getattr(settings, resource_field(kind, index)))


def _reserved(settings: RuntimeConfig, kind: str, index: int) -> dict[str, Any]:
    amounts = _amounts(settings, kind, index)
    return {
        "num_cpus": amounts.pop("CPU", 0),
        "num_gpus": amounts.pop("GPU", 0),
        "resources": amounts,
    }


def _bundle_places(kinds: Sequence[str]) -> dict[str, int]:
    """Kind -> place of the first bundle of that kind."""
    return {kind: list(kinds).index(kind) for kind in kinds}
