"""A training run in a process for every program: `runtime.kind` "processes" and "ray"."""

import contextlib
import functools
import pathlib
import threading
from typing import Any

from jaxvla.config import ConfigError, ExperimentConfig, override
from jaxvla.config_data import config_to_data
from jaxvla.runtime.channels import channel_config, own_host
from jaxvla.runtime.devices import offered_devices, share_out
from jaxvla.runtime.directory import Address
from jaxvla.runtime.launch import Launcher, ProcessLauncher
from jaxvla.runtime.pretrained import CHECKPOINTS
from jaxvla.runtime.ray_cluster import RayLauncher, check_ray
from jaxvla.runtime.replica_spec import LEARNER, SERVER, SIMULATOR, ReplicaSpec
from jaxvla.runtime.screen_forwarding import ScreenReceiver
from jaxvla.runtime.supervisor import Supervisor, new_token
from jaxvla.telemetry import program_log
from jaxvla.telemetry.progress import Screen


def check_cluster(config: ExperimentConfig, workdir: pathlib.Path) -> None:
    """Refuses what this machine or the work directory lacks, before anything is started.

    Raises:
      ConfigError: Ray is not installed, the processes need more devices than there are, or a
        learner of several processes would have to make the warm start.
    """
    if config.runtime.kind == "ray":
        check_ray(config.runtime)
    elif config.runtime.kind == "processes":
        share_out(config.runtime, _kinds(config), offered_devices())
    if config.runtime.learner_processes > 1 and config.warm_start.num_steps and _is_new(workdir):
        raise ConfigError(
            "runtime.learner_processes",
            config.runtime.learner_processes,
            "the warm start is made by one process; once it has saved, several go on from there",
            f"{override('runtime.learner_processes', 1)}, or {override('warm_start.num_steps', 0)} "
            f"{override('warm_start.num_grounding_steps', 0)}",
        )


def _is_new(workdir: pathlib.Path) -> bool:
    """Whether no checkpoint was ever completed there."""
    checkpoints = workdir.expanduser() / CHECKPOINTS
    return not any(path.name.isdecimal() for path in checkpoints.glob("*"))


def run_cluster(
    config: ExperimentConfig,
    *,
    workdir: pathlib.Path,
    screen: Screen,
    stop_requested: threading.Event,
    command: str,
) -> int:
    """Trains; returns the exit code of the contract.

    Args:
      config: validated; not resolved, as every process does that for itself.
      workdir: where to write; on a cluster, a directory that all machines share.
      screen: where to show.
      stop_requested: set by signals.
      command: the command line; it also continues the run.

    Raises:
      ConfigError: there is no such cluster, it lacks what the run asks for, or the address to
        listen on is not this machine's. Nothing has been written then.
    """
    workdir = workdir.expanduser().absolute()
    settings = config.runtime
    channel = channel_config(settings, new_token())
    with contextlib.ExitStack() as stack:
        with screen.phase(f"start {settings.kind}"):
            launcher, host = _launcher(config, workdir)
        receiver = stack.enter_context(contextlib.closing(ScreenReceiver(screen)))
        make_spec = functools.partial(
            _make_spec,
            host=settings.host,
            workdir=str(workdir),
            command=command,
            config=config_to_data(config),
        )
        try:
            supervisor = Supervisor(
                make_spec,
                num_learners=settings.learner_processes,
                num_servers=config.serving.num_servers,
                num_simulators=config.simulation.num_simulators,
                launcher=launcher,
                channel=channel,
                host=host,
                screen=receiver,
                stop_requested=stop_requested,
                settings=settings,
            )
        except OSError as error:
            launcher.close()
            fix = override("runtime.host", "127.0.0.1")
            allowed = f"cannot be listened on: {error}"
            raise ConfigError("runtime.host", settings.host, allowed, fix) from error
        stack.enter_context(program_log(workdir, "runtime"))
        return supervisor.run()


def _launcher(config: ExperimentConfig, workdir: pathlib.Path) -> tuple[Launcher, str]:
    """Where processes are started, and what the supervisor listens on."""
    settings = config.runtime
    kinds = _kinds(config)
    if settings.kind == "processes":
        environments = share_out(settings, kinds, offered_devices())
        return ProcessLauncher(workdir / "logs", environments), settings.host
    launcher = RayLauncher(settings, kinds)
    return launcher, own_host(settings)


def _kinds(config: ExperimentConfig) -> list[str]:
    """Of all processes of the run."""
    learners = [LEARNER] * config.runtime.learner_processes
    servers = [SERVER] * config.serving.num_servers
    return [*learners, *servers, *[SIMULATOR] * config.simulation.num_simulators]


def _make_spec(
    kind: str,
    index: int,
    control: Address,
    token: str,
    *,
    host: str,
    workdir: str,
    command: str,
    config: dict[str, Any],
) -> ReplicaSpec:
    return ReplicaSpec(
        kind=kind,
        index=index,
        launch=0,
        control=control,
        token=token,
        host=host,
        workdir=workdir,
        command=command,
        config=config,
    )
