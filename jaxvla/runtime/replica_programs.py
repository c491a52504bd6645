"""What a process of a run is, by its kind."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping

import jax

from jaxvla.checkpoint import CorruptCheckpointError
from jaxvla.config import ConfigError, ExperimentConfig, override
from jaxvla.runtime import jax_settings
from jaxvla.runtime.build import Blueprint, draw_blueprint
from jaxvla.runtime.channels import channel_config, own_host
from jaxvla.runtime.checks import check_checkpoint
from jaxvla.runtime.control import Control
from jaxvla.runtime.controller import EXIT_FINISHED, EXIT_UNSAFE, Controller
from jaxvla.runtime.pretrained import CHECKPOINTS, check_initial_weights
from jaxvla.runtime.provenance import write_config
from jaxvla.runtime.remote_crew import RemoteCrew
from jaxvla.runtime.replica_spec import LEARNER, REPLICA_ROLES, SERVER, SIMULATOR, ReplicaSpec
from jaxvla.runtime.screen_forwarding import ScreenForwarder
from jaxvla.runtime.server_replica import ServerReplica
from jaxvla.runtime.simulator_replica import SimulatorReplica
from jaxvla.transport.channel import ChannelConfig

Run = Callable[[ReplicaSpec, ExperimentConfig, Control], int]
"""Is the process until it ends; returns the exit code. Raises UsageError for settings that cannot
work here."""


def run_learner(spec: ReplicaSpec, config: ExperimentConfig, control: Control) -> int:
    """Trains as a run in one process does, with simulators and policy servers elsewhere."""
    workdir = pathlib.Path(spec.workdir)
    blueprint = _blueprint(spec, config, tuple(REPLICA_ROLES.values()))
    check_checkpoint(blueprint, workdir, "train")
    if not (workdir / CHECKPOINTS).is_dir():
        check_initial_weights(blueprint.policy, blueprint.config.model, blueprint.identity)
    write_config(blueprint, workdir)
    make_crew = functools.partial(
        RemoteCrew,
        control=control,
        channel=_channel(spec, config),
        host=own_host(config.runtime),
    )
    try:
        return Controller(
            blueprint,
            workdir=workdir,
            screen=ScreenForwarder(control.send),
            stop_requested=control.stop_requested,
            command=spec.command,
            make_crew=make_crew,
        ).run()
    except CorruptCheckpointError as error:
        control.tell("message", text=f"error: {error}")
        return EXIT_UNSAFE


def run_server(spec: ReplicaSpec, config: ExperimentConfig, control: Control) -> int:
    """See `runtime.server_replica`."""
    blueprint = _blueprint(spec, config, (REPLICA_ROLES[SERVER],))
    ServerReplica(spec, blueprint, control, _channel(spec, config)).run()
    return EXIT_FINISHED


def run_simulator(spec: ReplicaSpec, config: ExperimentConfig, control: Control) -> int:
    """See `runtime.simulator_replica`."""
    blueprint = _blueprint(spec, config, (REPLICA_ROLES[SIMULATOR],))
    SimulatorReplica(spec, blueprint, control, _channel(spec, config)).run()
    return EXIT_FINISHED


PROGRAMS: Mapping[str, Run] = {
    LEARNER: run_learner,
    SERVER: run_server,
    SIMULATOR: run_simulator,
}


def _channel(spec: ReplicaSpec, config: ExperimentConfig) -> ChannelConfig:
    return channel_config(config.runtime, bytes.fromhex(spec.token))


def _blueprint(spec: ReplicaSpec, config: ExperimentConfig, roles: tuple[str, ...]) -> Blueprint:
    """The run as this process sees it: its devices are its own.

    Raises:
      ConfigError: they are too few for a role that it plays.
    """
    jax_settings.configure(config)
    num_devices = jax.device_count()  # before the env is made, which may put arrays on a device
    blueprint = draw_blueprint(config, pathlib.Path(spec.workdir))
    layout = blueprint.layout.in_own_processes()
    for role in roles:
        needed = layout.roles[role].num_devices
        if needed > num_devices:
            raise ConfigError(
                "meshes.layout",
                config.meshes.layout,
                f"{spec.name} needs {needed} devices for {role}, and has {num_devices}",
                override("meshes.layout", f"colocated={num_devices}"),
            )
    return dataclasses.replace(blueprint, layout=layout)
