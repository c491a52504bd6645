"""Where records go: metrics.jsonl always; TensorBoard and Weights & Biases when asked for."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import numpy as np

from jaxvla.config import ConfigError
from jaxvla.telemetry import WRITERS
from jaxvla.telemetry.metrics import Number

_logger = logging.getLogger(__name__)


MOST_PENDING_BYTES = 2**24
"""Of records that wait for room on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a writer needs to know of the run."""

    workdir: pathlib.Path
    name: str
    config: Mapping[str, Any]
    """Resolved config as nested dicts that JSON can hold."""
    resume_update: int | None
    """Update of the checkpoint that the run continues from; None: it starts anew."""


class MetricWriter(Protocol):
    """A destination of records."""

    def __init__(self, run: RunInfo) -> None: ...

    @classmethod
    def check(cls) -> None:
        """Raises ValueError when the writer cannot work here. Touches no file."""
        ...

    def write(self, record: Mapping[str, Number]) -> None:
        """Takes a record; its `update` is greater than that of the record before.

        Raises:
          OSError: it could not be written for now. The writer can be used further.
        """
        ...

    def close(self) -> None:
        """Flushes and closes; calling it again does nothing."""
        ...


def find_writers(names: Sequence[str]) -> list[type[MetricWriter]]:
    """Classes of `config.telemetry.writers`, checked before anything is written.

    Raises:
      ValueError: a name is unknown or its package is missing.
    """
    found = [WRITERS.get(name) for name in names]
    for writer in found:
        writer.check()
    return found


@contextlib.contextmanager
def open_writers(run: RunInfo, names: Sequence[str]) -> Iterator[list[MetricWriter]]:
    """Opens metrics.jsonl and the writers named, and closes them all at the end of the block."""
    with contextlib.ExitStack() as stack:
        writers: list[MetricWriter] = []
        for kind in (JsonlWriter, *find_writers(names)):
            writers.append(kind(run))
            stack.callback(writers[-1].close)
        yield writers


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a text file that takes the place of `path` when the block ends without an error.

    Whoever reads `path`, also after a kill or a power cut, finds the old or the new content.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces `path` by a JSON document, atomically; non-finite numbers become null."""
    with replacing(path) as file:
        json.dump(_finite(value), file, indent=2, allow_nan=False)
        file.write("\n")


def _finite(value: Any) -> Any:
    """Copy of nested dicts and sequences with None for NaN and infinity, numpy scalars as Python's.

    JSON has no such numbers, and Python's own spelling of them breaks other readers.
    """
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlWriter:
    """metrics.jsonl: one JSON object a line, in order of `update`, flushed record by record.

    A kill leaves at most one torn line, at the end. On opening, the file is cut before
    the first line that is torn or newer than the checkpoint the run continues from: those
    updates are made again. Updates ascend, so what is cut is a tail and cutting is a single
    truncation. Hence no update is there twice, and none is missing as long as a record is
    written before its checkpoint; what is missing all the same is logged.

    A record that a full disk has no room for is kept and written before the next one.
    """

    def __init__(self, run: RunInfo):
        """Opens and repairs the file.

        Raises:
          ValueError: a line to be kept is no record, or updates do not ascend.
        """
        path = run.workdir / "metrics.jsonl"
        path.touch()
        resume_update = -1 if run.resume_update is None else run.resume_update
        num_bytes, self._last_update = _whole_records(path, resume_update)
        first_missing = max(self._last_update, 0) + 1
        if first_missing <= resume_update:
            _logger.warning("%s: no updates %d..%d", path, first_missing, resume_update)
        # Unbuffered: what was not written is in `_pending`, and nowhere else.
        self._file = path.open("r+b", buffering=0)
        self._pending = bytearray()
        """The end of the file that is not written yet; it may begin within a line."""
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)

    @classmethod
    def check(cls) -> None:
        """Needs nothing."""

    def write(self, record: Mapping[str, Number]) -> None:
        """Appends a record; non-finite numbers become null.

        Raises:
          ValueError: `update` is not greater than that of the record before.
          OSError: the record could not be written whole. It will be tried again, unless there is
            too much to be kept: then it is lost.
        """
        update = int(record["update"])
        if update <= self._last_update:
            raise ValueError(f"record of update {update} after update {self._last_update}")
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        self._last_update = update
        self._pending += line.encode()
        try:
            self._write_pending()
        except OSError:
            if len(self._pending) > MOST_PENDING_BYTES:
                del self._pending[-len(line) :]
            raise

    def close(self) -> None:
        """Closes the file, after a last attempt to write what it lacks."""
        if self._file.closed:
            return
        try:
            self._write_pending()
        except OSError as error:
            num_lost = self._pending.count(b"\n")
            _logger.error("%s: the last %d records are lost: %s", self._file.name, num_lost, error)
        self._file.close()

    def _write_pending(self) -> None:
        while self._pending:
            num_written = self._file.write(self._pending)
            del self._pending[:num_written]


def _whole_records(path: pathlib.Path, resume_update: int) -> tuple[int, int]:
    """Bytes of whole lines up to `resume_update`, and the update of the last one (else -1)."""
    num_bytes, last_update = 0, -1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            update = _update_of(line, where=f"{path}:{number}")
            if update <= last_update:
                raise ValueError(f"{path}:{number}: update {update} after update {last_update}")
            if update > resume_update:
                break
            num_bytes, last_update = num_bytes + len(line), update
    return num_bytes, last_update


def _update_of(line: bytes, *, where: str) -> int:
    """The update of a whole line of metrics.jsonl."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a metrics record; move the file away") from error


def _check_package(writer: str, package: str) -> None:
    """Raises ValueError, naming the extra to install, when `package` is missing."""
    if importlib.util.find_spec(package) is None:
        fix = f"pip install 'jaxvla[{writer}]', or take {writer} out"
        raise ConfigError("telemetry.writers", writer, f"needs the package {package}", fix)


class TensorboardWriter:
    """Event files in tensorboard/, one scalar a metric, over `update`."""

    def __init__(self, run: RunInfo):
        import tensorboardX  # pyright: ignore[reportMissingImports]

        # Makes TensorBoard hide what a crashed run wrote beyond the checkpoint.
        purge_step = 0 if run.resume_update is None else run.resume_update + 1
        logdir = str(run.workdir / "tensorboard")
        self._writer = tensorboardX.SummaryWriter(logdir=logdir, purge_step=purge_step)

    @classmethod
    def check(cls) -> None:
        _check_package("tensorboard", "tensorboardX")

    def write(self, record: Mapping[str, Number]) -> None:
        """Adds the finite values of a record."""
        for name, value in record.items():
            if name != "update" and math.isfinite(value):
                self._writer.add_scalar(name, value, global_step=int(record["update"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run per work directory, continued on resume.

    `update` is the x axis of every chart instead of W&B's own step, which only ascends:
    updates made again after a crash are then drawn, not refused.
    """

    def __init__(self, run: RunInfo):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            id=_run_id(run.workdir / "wandb_id"),
            resume="allow",
            name=run.name,
            config=dict(run.config),
            dir=str(run.workdir),
        )
        self._run.define_metric("*", step_metric="update")

    @classmethod
    def check(cls) -> None:
        _check_package("wandb", "wandb")

    def write(self, record: Mapping[str, Number]) -> None:
        """Sends a record; non-finite values are left out."""
        self._run.log({name: value for name, value in record.items() if math.isfinite(value)})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: pathlib.Path) -> str:
    """The run id kept in `path`, made on first use."""
    if not path.exists():
        with replacing(path) as file:
            file.write(uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
