"""A process for one program of a run: what the supervisor starts.

    python -m jaxvla.runtime.replica < SPEC

consumes    a spec (`runtime.replica_spec`) on its standard input, which then stays open
produces    the program; "ended" to the supervisor, with the exit code and why
waits for   what its program waits for
unblocked by  the supervisor: a stop, or its death

No jax at the top: process settings come first.
"""

import logging
import os
import pathlib
import sys
import threading
import time
from typing import BinaryIO

from jaxvla.config import ExperimentConfig, UsageError
from jaxvla.config_data import config_from_data
from jaxvla.runtime import cpu_settings
from jaxvla.runtime.channels import channel_config
from jaxvla.runtime.control import Control
from jaxvla.runtime.replica_spec import REPLICA_ROLES, ReplicaSpec
from jaxvla.telemetry import program_log

_LOG = logging.getLogger("jaxvla.runtime")

EXIT_FINISHED, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main() -> None:
    """Entry point of the process."""
    spec = ReplicaSpec.from_json(sys.stdin.buffer.readline().decode())
    config = config_from_data(spec.config)
    threading.Thread(
        target=_die_with_parent, args=(sys.stdin.buffer, config.runtime.grace_s), daemon=True
    ).start()
    code = run(spec)
    # Threads that hang must not keep the process: what has to be written is written.
    sys.stdout.flush()
    os._exit(code)


def run(spec: ReplicaSpec) -> int:
    """Is the process that a spec says, until it ends; returns its exit code."""
    cpu_settings.apply()
    config = config_from_data(spec.config)
    workdir = pathlib.Path(spec.workdir)
    role = REPLICA_ROLES[spec.kind]
    channel = channel_config(config.runtime, bytes.fromhex(spec.token))
    with program_log(workdir, "runtime"), program_log(workdir, role):
        _LOG.info("%s is process %d", spec.name, os.getpid())
        control = Control(spec, channel, config.runtime.grace_s)
        code, detail = _run(spec, config, control)
        control.tell("ended", code=code, detail=detail)
        control.close()
    return code


def _run(spec: ReplicaSpec, config: ExperimentConfig, control: Control) -> tuple[int, str]:
    """Exit code, and what went wrong."""
    try:
        # Not at the top: all of it imports jax.
        from jaxvla.runtime.replica_programs import PROGRAMS

        return PROGRAMS[spec.kind](spec, config, control), ""
    except UsageError as error:
        return EXIT_USAGE, str(error)
    except Exception as error:  # told to the user by the supervisor, which may start it again
        _LOG.exception("%s failed", spec.name)
        return EXIT_FAILED, f"{type(error).__name__}: {error}"


def _die_with_parent(pipe: BinaryIO, grace_s: float) -> None:
    """Ends the process some time after its supervisor: by then the lost control connection has
    made it stop, if it could."""
    while pipe.read(4096):
        pass
    time.sleep(grace_s)
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
