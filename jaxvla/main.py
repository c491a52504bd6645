"""The command line.

    python -m jaxvla.main --config=configs/quickstart.py [--config.section.field=value ...]
                          [--workdir=DIR] [--job=train|evaluate] [--dry_run] [--noresume]

Jobs
  train     optional supervised warm start, then asynchronous RL
  evaluate  the newest checkpoint of the work directory on fixed episodes

Exit codes: 0 finished, 1 a program failed, 2 bad usage or config, 3 stopped by a signal
(the same command continues), 4 a safety stop.

Nothing is imported here that imports jax before the settings for CPU runs are in place.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxvla import config as config_lib
from jaxvla.registry import nearest
from jaxvla.runtime import cpu_settings

EXIT_FINISHED, EXIT_USAGE = 0, 2
JOBS = ("train", "evaluate")


class UsageError(ValueError):
    """The command line cannot work. The message says what to change."""


def console_main() -> None:
    """Entry point of the `jaxvla` command."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs one job; returns the exit code of the contract."""
    # First of all: config files import plug-ins, and those import jax.
    settings = cpu_settings.apply()
    try:
        options, config = parse(argv)
        if config is None:
            _say(f"{__doc__}\n{options.main_module_help()}")
            return EXIT_FINISHED
        config_lib.validate(config)
        from jaxvla.runtime import jobs

        for line in settings:
            _say(line)
        return jobs.run(
            job=options["job"].value,
            config=config,
            workdir=pathlib.Path(options["workdir"].value or f"runs/{config.name}"),
            is_dry_run=options["dry_run"].value,
            may_resume=options["resume"].value,
            command=shlex.join(["python", "-m", "jaxvla.main", *argv[1:]]),
        )
    except (UsageError, config_lib.ConfigError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, config_lib.ExperimentConfig | None]:
    """Flags and config; no config when help is asked for.

    Raises:
      UsageError: an unknown flag or setting, a wrong type, a file that cannot be loaded.
    """
    options, holder = _define_flags()
    try:
        rest = options(argv)
        if options["help"].value:
            return options, None
        config = _loaded(holder)
    except flags.UnrecognizedFlagError as error:
        known = [f"--{name}" for name in options]
        name = f"--{error.flagname}"
        raise UsageError(f"unknown flag {name}{nearest(name, known)}; try --help") from error
    except flags.Error as error:
        raise UsageError(str(error)) from error
    except KeyError as error:
        raise UsageError(_unknown_setting(argv)) from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}; settings look like --config.seed=1")
    return options, config


def _define_flags() -> tuple[flags.FlagValues, Any]:
    """Fresh flag values, so that parsing twice in a process works."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/quickstart.py.", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "Where to write; default runs/NAME.", flag_values=values)
    flags.DEFINE_enum("job", "train", list(JOBS), "What to do.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print the plan and write nothing.", flag_values=values)
    flags.DEFINE_bool("resume", True, "Continue a used work directory.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values, holder


def _loaded(holder: Any) -> config_lib.ExperimentConfig:
    """The config behind the flag.

    Raises:
      UsageError: there is none, or its file cannot be loaded.
    """
    config = holder.value
    if config is None:
        raise UsageError("--config is missing, e.g. --config=configs/quickstart.py")
    if isinstance(config, config_lib.ExperimentConfig):
        return config
    try:
        cause = vars(config)["_error"]
    except KeyError:
        cause = f"get_config() returned {type(config).__name__}, want an ExperimentConfig"
    raise UsageError(f"--config: {cause}")


def _unknown_setting(argv: Sequence[str]) -> str:
    """Names the first override that matches no field, with the nearest one."""
    path = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    options, holder = _define_flags()
    options([argv[0], f"--config={path}"])
    known = list(config_lib.field_names(_loaded(holder)))
    for argument in argv[1:]:
        name, is_setting, value = argument.partition("=")
        name = name.removeprefix("--no").removeprefix("--").removeprefix("config.")
        if argument.startswith(("--config.", "--noconfig.")) and name not in known:
            given = f" = {value!r}" if is_setting else ""
            section = name.rpartition(".")[0]
            beside = [x.rpartition(".")[2] for x in known if x.rpartition(".")[0] == section]
            fields = f"; fields of {section}: {', '.join(beside)}" if section and beside else ""
            return f"config.{name}{given}: no such setting{nearest(name, known)}{fields}"
    return "an override names no setting of the config"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    console_main()
