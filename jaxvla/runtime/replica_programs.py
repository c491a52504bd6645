"""What a process of a run is, by its kind."""

import contextlib
import dataclasses
import functools
import pathlib
import threading
from collections.abc import Callable, Mapping

import jax

from jaxvla import multihost
from jaxvla.checkpoint import CorruptCheckpointError
from jaxvla.config import ConfigError, ExperimentConfig, override
from jaxvla.runtime import jax_settings
from jaxvla.runtime.build import Blueprint, draw_blueprint
from jaxvla.runtime.channels import channel_config, own_host
from jaxvla.runtime.checks import check_checkpoint
from jaxvla.runtime.control import Control
from jaxvla.runtime.controller import EXIT_FINISHED, EXIT_STOPPED, EXIT_UNSAFE, Controller
from jaxvla.runtime.follower_replica import FollowerReplica
from jaxvla.runtime.gang import Alone, Gang, gather
from jaxvla.runtime.pretrained import CHECKPOINTS, check_initial_weights
from jaxvla.runtime.provenance import write_config
from jaxvla.runtime.remote_crew import RemoteCrew
from jaxvla.runtime.replica_spec import LEARNER, REPLICA_ROLES, SERVER, SIMULATOR, ReplicaSpec
from jaxvla.runtime.screen_forwarding import ScreenForwarder
from jaxvla.runtime.server_replica import ServerReplica
from jaxvla.runtime.signals import stop_on_signals
from jaxvla.runtime.simulator_replica import SimulatorReplica
from jaxvla.transport.channel import ChannelConfig

Run = Callable[[ReplicaSpec, ExperimentConfig, Control], int]
"""Is the process until it ends; returns the exit code. Raises UsageError for settings that cannot
work here."""


def run_learner(spec: ReplicaSpec, config: ExperimentConfig, control: Control) -> int:
    """The learner, or one process of it: the first one leads the others."""
    if config.runtime.learner_processes == 1:
        return _train(spec, config, control, Alone())
    with _stopping_on_signals(control):
        if spec.index:
            draw = functools.partial(_blueprint, spec, config, (REPLICA_ROLES[LEARNER],))
            FollowerReplica(spec, config, draw, control, _channel(spec, config)).run()
            return EXIT_FINISHED
        host = own_host(config.runtime)
        gang = gather(spec, config.runtime, control, _channel(spec, config), host)
        return EXIT_STOPPED if gang is None else _train(spec, config, control, gang)


def _train(spec: ReplicaSpec, config: ExperimentConfig, control: Control, gang: Gang) -> int:
    """Trains as a run in one process does, with simulators and policy servers elsewhere."""
    workdir = pathlib.Path(spec.workdir)
    blueprint = _blueprint(spec, config, tuple(REPLICA_ROLES.values()))
    gang.line_up()
    check_checkpoint(blueprint, workdir, "train")
    if not (workdir / CHECKPOINTS).is_dir():
        check_initial_weights(blueprint.policy, blueprint.config.model, blueprint.identity)
    multihost.agree(True)  # all have read what the directory holds
    write_config(blueprint, workdir)
    make_crew = functools.partial(
        RemoteCrew,
        control=control,
        channel=_channel(spec, config),
        host=own_host(config.runtime),
        fetch=gang.fetch,
    )
    try:
        code = Controller(
            blueprint,
            workdir=workdir,
            screen=ScreenForwarder(control.send),
            stop_requested=control.stop_requested,
            command=spec.command,
            make_crew=make_crew,
            gang=gang,
        ).run()
        gang.end()
        return code
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


def _stopping_on_signals(control: Control) -> contextlib.AbstractContextManager[None]:
    """While the block runs, a signal asks for a stop: hosts are told so before they are taken."""
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()  # an actor: Ray has the signals
    return stop_on_signals(control.stop_requested)


def _blueprint(spec: ReplicaSpec, config: ExperimentConfig, roles: tuple[str, ...]) -> Blueprint:
    """The run as this process sees it: its devices are its own.

    Raises:
      ConfigError: they are too few for a role that it plays.
    """
    jax_settings.configure(config)
    # Before the env is made, which may put arrays on a device.
    num_devices, num_in_all = jax.local_device_count(), jax.device_count()
    blueprint = draw_blueprint(config, pathlib.Path(spec.workdir))
    layout = blueprint.layout.in_own_processes()
    for role in roles:
        needed = layout.roles[role].num_devices
        if role == REPLICA_ROLES[LEARNER] and jax.process_count() > 1:
            _require_all_devices(config, needed, num_in_all, num_devices)
        elif needed > num_devices:
            raise ConfigError(
                "meshes.layout",
                config.meshes.layout,
                f"{spec.name} needs {needed} devices for {role}, and has {num_devices}",
                override("meshes.layout", f"colocated={num_devices}"),
            )
    return dataclasses.replace(blueprint, layout=layout)


def _require_all_devices(
    config: ExperimentConfig, needed: int, num_in_all: int, num_devices: int
) -> None:
    """Refuses a learning mesh that is not made up of all devices of all learner processes."""
    if needed != num_in_all:
        raise ConfigError(
            "meshes.layout",
            config.meshes.layout,
            f"learning needs {needed} devices, and the {config.runtime.learner_processes} learner "
            f"processes have {num_in_all}",
            override(
                "meshes.layout", f"simulation+serving={num_devices}@0 learning={num_in_all}@0"
            ),
        )
