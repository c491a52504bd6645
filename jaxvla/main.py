"""The command line.

    python -m jaxvla.main --config=configs/quickstart.py [--config.section.field=value ...]
                          [--workdir=DIR]
                          [--job=train|finetune|evaluate|serve|export|compile_tasks|sweep]
                          [--judge] [--dry_run] [--noresume]
                          [--export_dir=DIR] [--asset_id=NAME]
                          [--record_schedule=FILE] [--replay_schedule=FILE]

Jobs
  train          optional supervised warm start, then asynchronous RL
  finetune       supervised fine-tuning on demonstrations, see docs/finetuning.md
  evaluate       the newest checkpoint of the work directory on fixed episodes; with --judge also
                 in the env that has the last word (LIBERO itself for libero_mjx)
  serve          that checkpoint on a websocket, for openpi's clients, until SIGTERM or SIGINT
  export         that checkpoint as one of openpi, in --export_dir, which must not exist
  compile_tasks  the task files of libero_mjx, from the installed LIBERO package
  sweep          short runs of many layouts and settings (config.sweep), see docs/scaling.md

Exit codes: 0 finished, 1 a program failed, 2 bad usage or config, 3 stopped by a signal
(the same command continues), 4 a safety stop. A signal is the end that serve is meant to have:
once its requests are answered it exits with 0.

Nothing is imported here that imports jax before the settings for CPU runs are in place.
"""

import copy
import difflib
import os
import pathlib
import re
import runpy
import shlex
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxvla.config import ConfigError, ExperimentConfig, UsageError, field_names, override
from jaxvla.registry import nearest
from jaxvla.runtime import cpu_settings
from jaxvla.validation import type_name, validate

EXIT_FINISHED, EXIT_USAGE, EXIT_STOPPED = 0, 2, 3
JOBS = ("train", "finetune", "evaluate", "serve", "export", "compile_tasks", "sweep")
_AUTO = "auto"
"""Value of meshes.layout that has one chosen."""


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
        is_auto = config.meshes.layout == _AUTO
        if is_auto:
            config.meshes.layout = _smallest_layout(config)
        validate(config)
        from jaxvla.runtime import jobs

        for line in settings:
            _say(line)
        if options["job"].value == "sweep":
            return _sweep(argv, options, config)
        if is_auto:
            config.meshes.layout = _choose_layout(argv, options, config)
            validate(config)
        return jobs.run(
            job=str(options["job"].value),
            config=config,
            workdir=_workdir(options, config),
            is_dry_run=bool(options["dry_run"].value),
            may_resume=bool(options["resume"].value),
            command=shlex.join(["python", "-m", "jaxvla.main", *argv[1:]]),
            with_judge=bool(options["judge"].value),
            export_dir=_path(options["export_dir"].value),
            asset_id=options["asset_id"].value,
            record_schedule=_path(options["record_schedule"].value),
            replay_schedule=_path(options["replay_schedule"].value),
        )
    except UsageError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USAGE
    except _StoppedError:
        return EXIT_STOPPED


class _StoppedError(Exception):
    """A signal asked to stop while a layout was being chosen."""


def _workdir(options: flags.FlagValues, config: ExperimentConfig) -> pathlib.Path:
    return pathlib.Path(options["workdir"].value or f"runs/{config.name}")


def _check_flags(
    options: flags.FlagValues, config: ExperimentConfig, workdir: pathlib.Path
) -> None:
    """Refuses flags that do not fit the job, for jobs that begin before `jobs.run` looks at them.

    Raises:
      UsageError: a flag of another job, or a schedule where there is none.
    """
    from jaxvla.runtime import jobs

    job = str(options["job"].value)
    is_exporting = bool(options["export_dir"].value or options["asset_id"].value)
    jobs.check_flags(job, with_judge=bool(options["judge"].value), is_exporting=is_exporting)
    jobs.check_schedules(
        _path(options["record_schedule"].value),
        _path(options["replay_schedule"].value),
        job=job,
        kind=config.runtime.kind,
        workdir=workdir,
    )


def _arguments(argv: Sequence[str], options: flags.FlagValues) -> list[str]:
    """--config and the settings of a command line, for other commands."""
    settings = _define_flags()(list(argv), known_only=True)[1:]
    return [f"--config={options['config'].value}", *settings]


def _sweep(argv: Sequence[str], options: flags.FlagValues, config: ExperimentConfig) -> int:
    """The job whose trials are runs of this command with other settings."""
    from jaxvla.scaling import sweep_job

    workdir = pathlib.Path(options["workdir"].value or f"runs/{config.name}_sweep")
    _check_flags(options, config, workdir)

    def reconfigure(changes: Mapping[str, str]) -> ExperimentConfig:
        arguments = [f"--config.{name}={value}" for name, value in changes.items()]
        return _override(copy.deepcopy(config), [argv[0], *arguments], [])

    return sweep_job.run(
        config,
        workdir=workdir,
        is_dry_run=bool(options["dry_run"].value),
        may_resume=bool(options["resume"].value),
        arguments=_arguments(argv, options),
        command=shlex.join(["python", "-m", "jaxvla.main", *argv[1:]]),
        reconfigure=reconfigure,
    )


def _smallest_layout(config: ExperimentConfig) -> str:
    """What stands in for a layout that is to be chosen, while the rest is checked."""
    serving = config.serving
    servers = serving.num_servers if serving.split_devices else 1
    return "colocated=1" if servers == 1 else f"simulation=1 learning=1 serving={servers}"


def _choose_layout(argv: Sequence[str], options: flags.FlagValues, config: ExperimentConfig) -> str:
    """The layout that the run in the work directory has, or the fastest in short trials.

    Raises:
      UsageError: there is no run and none is to begin, or no trial gave numbers.
      _StoppedError: a signal asked to stop.
    """
    from jaxvla.runtime import jobs, signals
    from jaxvla.scaling import auto_layout, trial_run

    workdir, job = _workdir(options, config), str(options["job"].value)
    layout = auto_layout.known_layout(workdir)
    if layout is not None:
        return layout
    if job != "train" or options["dry_run"].value:
        raise ConfigError(
            "meshes.layout",
            _AUTO,
            "only a run of --job=train chooses a layout, and later jobs find it in its --workdir",
            "--config.meshes.layout=colocated=1, or --job=sweep",
        )
    _check_flags(options, config, workdir)
    has_weights = bool(config.model.initial_weights)
    jobs.check_workdir(workdir, job, bool(options["resume"].value), has_weights)
    stop_requested = threading.Event()
    try:
        with signals.stop_on_signals(stop_requested):
            return auto_layout.choose_layout(
                _arguments(argv, options),
                workdir=workdir,
                say=_say,
                stop_requested=stop_requested,
            )
    except trial_run.SweepStoppedError as error:
        raise _StoppedError from error


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, ExperimentConfig | None]:
    """Flags and config; no config when help is asked for.

    Raises:
      UsageError: an unknown flag or setting, a wrong type, a file that cannot be loaded.
    """
    options = _define_flags()
    try:
        rest = options(list(argv), known_only=True)
    except flags.Error as error:
        raise UsageError(str(error)) from error
    if options["help"].value:
        return options, None
    if not options["config"].value:
        raise UsageError("--config is missing. Fix: --config=configs/quickstart.py")
    config = load_config(options["config"].value)
    return options, _override(config, rest, [f"--{name}" for name in options])


def _define_flags() -> flags.FlagValues:
    """Fresh flag values, so that parsing twice in a process works. Settings are not among them."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string(
        "config", None, "Config file, e.g. configs/quickstart.py.", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "Where to write; default runs/NAME.", flag_values=values)
    flags.DEFINE_enum("job", "train", list(JOBS), "What to do.", flag_values=values)
    flags.DEFINE_bool(
        "dry_run", False, "Print the plan, of any number of devices.", flag_values=values
    )
    flags.DEFINE_bool("judge", False, "Evaluate in the env's judge too.", flag_values=values)
    flags.DEFINE_string(
        "export_dir", None, "Where to export to; default WORKDIR/openpi.", flag_values=values
    )
    flags.DEFINE_string(
        "asset_id",
        None,
        "Data set whose statistics are exported; default physical-intelligence/libero.",
        flag_values=values,
    )
    flags.DEFINE_bool("resume", True, "Continue a used work directory.", flag_values=values)
    flags.DEFINE_string(
        "record_schedule",
        None,
        "Write what timing decides in this run to a new file.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "replay_schedule", None, "Follow such a file, to the same losses.", flag_values=values
    )
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    return values


def load_config(source: str) -> ExperimentConfig:
    """What `get_config` of a config file returns.

    Args:
      source: path of the file, or PATH:ARGUMENT to call `get_config(ARGUMENT)`.

    Raises:
      UsageError: there is no such file, it raises, or it returns something else.
    """
    path, _, argument = source.partition(":")
    if not os.path.isfile(path):
        raise UsageError(f"--config={source}: there is no file {path}")
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if argument else get_config()
    except Exception as error:  # whatever the user's code raises is the user's to read
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        message = f"--config={source}: {type(error).__name__}{where}: {error}"
        raise UsageError(message) from error
    if not isinstance(config, ExperimentConfig):
        raise UsageError(
            f"--config={source}: get_config() returned {type(config).__name__}, "
            "want an ExperimentConfig"
        )
    return config


def _override(
    config: ExperimentConfig, arguments: list[str], options: list[str]
) -> ExperimentConfig:
    """The config with the --config.section.field=value arguments applied.

    Args:
      config: from its file.
      arguments: program name, then what is left of the command line.
      options: the known flags, for hints.

    Raises:
      UsageError: an argument names no setting, or its value has the wrong type.
    """
    known = list(field_names(config))
    for argument in arguments[1:]:
        match = re.fullmatch(r"--?(?:no)?config\.([^=]*)=?(.*)", argument, re.DOTALL)
        if match and match[1] not in known:
            raise UsageError(_no_such_setting(match[1], match[2], known))
    arguments = _last_of_each(arguments)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    holder = config_flags.DEFINE_config_dataclass(
        "config", config, flag_values=values, sys_argv=arguments
    )
    try:
        rest = values(arguments)
    except flags.UnrecognizedFlagError as error:
        name = f"--{error.flagname}"
        hint = nearest(name, options)
        raise UsageError(f"unknown flag {name}{hint}. Fix: see --help") from error
    except flags.Error as error:
        raise _bad_value(config, str(error)) from error
    if len(rest) > 1:
        raise UsageError(
            f"unexpected argument {rest[1]!r}. Fix: settings look like --config.seed=1"
        )
    return holder.value


def _last_of_each(arguments: list[str]) -> list[str]:
    """Without settings that are given again later: of those ml_collections would join tuples."""
    last: dict[str | int, str] = {}
    for place, argument in enumerate(arguments):
        name, is_assigned, _ = argument.partition("=")
        last[name if is_assigned and name.startswith("--config.") else place] = argument
    return list(last.values())


def _no_such_setting(name: str, value: str, known: list[str]) -> str:
    """Names the nearest setting, and the fields of the section that was meant."""
    is_section = any(x.startswith(f"{name}.") for x in known)
    section = name if is_section else name.rpartition(".")[0]
    beside = [x.removeprefix(f"{section}.") for x in known if x.startswith(f"{section}.")]
    what = "is a section, not a setting" if is_section else "no such setting"
    fields = f"; fields of {section}: {', '.join(beside)}" if beside else ""
    close = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean {override(close[0], value)} ?" if close else "see the config file"
    return f"config.{name} = {value!r}: {what}{fields}. Fix: {fix}"


def _bad_value(config: ExperimentConfig, message: str) -> UsageError:
    """Rewords what absl says about a value of the wrong type."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return UsageError(message)
    *sections, name = match[1].split(".")
    holder: Any = config
    for section in sections:
        holder = getattr(holder, section)
    kind = type(holder).__dataclass_fields__[name].type
    fix = override(match[1], getattr(holder, name))
    return ConfigError(match[1], match[2], f"must be {type_name(kind)}", fix)


def _path(value: str | None) -> pathlib.Path | None:
    return pathlib.Path(value) if value else None


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    console_main()
