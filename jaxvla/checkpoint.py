"""Checkpoints that are atomic, verified, and restored only against a known structure.

A step holds two items: `arrays`, a pytree of arrays (orbax), and `record`, JSON with
counters and the dtype, shape and SHA-256 of every leaf. Orbax makes a step visible only
when all of it is written. It does not notice flipped bytes in a data file, hence the
digests: a step that does not match is skipped with a loud message in favour of the one
before it. A step that is sound but has another structure is refused.

Several processes of one learner save and restore together ("collective" in `jaxvla.multihost`),
in a directory that all of them see; the leader's record counts. A step does not show how many
processes wrote it.
"""

import hashlib
import json
import logging
import pathlib
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxvla import multihost
from jaxvla.config import UsageError
from jaxvla.sharding import path_name

_LOG = logging.getLogger(__name__)

_UNFINISHED = "*.orbax-checkpoint-tmp"
"""Steps that a killed process left behind."""

_LeafKinds = dict[str, str]
"""Leaf path -> dtype and shape, such as "float32 [2, 3]"."""

TargetFor = Callable[[dict[str, Any]], Any]
"""From a step's record to the pytree of arrays or shape structs (with shardings) that the
step must match."""


class CorruptCheckpointError(RuntimeError):
    """Every checkpoint of the work directory is damaged."""


class CheckpointMismatchError(UsageError):
    """A sound checkpoint has other leaves, shapes or dtypes than the run, or another identity."""


class SaveError(RuntimeError):
    """A step could not be written. Those before it are as they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A checkpoint that passed verification."""

    step: int
    arrays: Any
    """As the target given to `restore`."""
    record: dict[str, Any]
    """The JSON record given to `save`."""


class _DamagedError(Exception):
    """A step cannot be read, or is not what was written."""


class Checkpointer:
    """Checkpoints of one work directory."""

    def __init__(
        self, directory: pathlib.Path, *, keep: int, identity: Mapping[str, str] | None = None
    ):
        """Args:
        directory: made when first written.
        keep: how many newest steps are kept.
        identity: what a step must share with the run though no array shows it, by name, such
          as the fingerprint of the tokenizer.
        """
        self._directory = directory.resolve()
        self._keep = keep
        self._identity = dict(identity or {})
        self._manager: ocp.CheckpointManager | None = None
        self.passed_over: dict[int, str] = {}
        """Steps found damaged since the last save, and how."""
        self._has_saved = False

    def steps(self) -> list[int]:
        """Complete steps, oldest first. Writes nothing."""
        if not self._directory.is_dir():
            return []
        return sorted(self._open().all_steps())

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Collective: writes a step and returns when it is complete. An existing step stays as it
        is.

        Steps that `restore` passed over are set aside first, as STEP.damaged-*: else the
        run would not be able to write them again.

        Args:
          step: learner update, greater than those of all sound steps.
          arrays: pytree of arrays, none of them empty. Host arrays and `record` are the leader's;
            other processes need only give the global arrays.
          record: JSON-serialisable counters.

        Raises:
          ValueError: there is a later step, or an array is empty.
          TypeError: JSON cannot hold the record. Nothing has been written then.
          SaveError: such as a full disk. What was written of the step is removed.
        """
        self._set_damaged_aside()
        self._remove_unfinished()
        manager = self._open()
        steps = manager.all_steps()
        if step in steps:
            return
        if steps and step < max(steps):
            raise ValueError(f"step {step} comes after step {max(steps)} was saved")
        empty = [name for name, kind in _kinds(arrays).items() if re.search(r"\b0\b", kind)]
        if empty:
            raise ValueError(f"{empty[0]} is empty, which a checkpoint cannot hold")
        body = {
            "record": record,
            "identity": self._identity,
            "kinds": _kinds(arrays),
            "digests": _digests(arrays),
        }
        body = json.loads(json.dumps(body))  # as it will be read: keys are strings
        items = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(arrays),
            record=ocp.args.JsonSave({**body, "digest": _json_digest(body)}),
        )
        try:
            manager.save(step, args=items)
            manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore's are ValueErrors
            self.close()  # orbax remembers the step
            self._remove_unfinished(is_own=True)
            # Threads of orbax may still be writing; what they leave goes before the next save.
            self._has_saved = False
            reason = str(error).strip().partition("\n")[0]
            raise SaveError(f"checkpoint {step} could not be written: {reason}") from error

    def restore(self, target_for: TargetFor, *, within: str = "") -> Restored | None:
        """Collective: the newest step that passes verification, or None when there is no step.

        Args:
          target_for: what the step must match.
          within: prefix of leaf paths, such as "state/params/". Other leaves are neither read
            nor verified, and the target has none of them.

        Raises:
          CheckpointMismatchError: the newest sound step does not match.
          CorruptCheckpointError: there are steps, and all of them are damaged.
          UsageError: the processes of the learner see different directories.
        """
        self.passed_over = {}
        steps = self.steps()
        if not multihost.same_everywhere(zlib.crc32(repr(steps).encode()) >> 1):
            raise UsageError(
                f"learner process {jax.process_index()} sees steps {steps} in {self._directory}, "
                "others see other ones. Fix: --workdir=DIR on a file system that all hosts share"
            )
        for step in reversed(steps):
            try:
                return self._restore(step, target_for, within)
            except _DamagedError as error:
                _LOG.error("checkpoint %d is damaged and was passed over: %s", step, error)
                self.passed_over[step] = str(error)
        if steps:
            raise CorruptCheckpointError(
                f"no checkpoint in {self._directory} passes verification (steps {steps}); "
                "see logs, or start anew with another --workdir"
            )
        return None

    def check(self, target_for: TargetFor, *, within: str = "") -> None:
        """Compares the newest readable step with a target, without reading its arrays.

        Args:
          target_for, within: as for `restore`.

        Raises:
          CheckpointMismatchError: they do not match.
        """
        for step in reversed(self.steps()):
            try:
                body = self._body(step)
            except _DamagedError:
                continue  # `restore` says so
            self._matched_target(step, body, target_for, within)
            return

    def close(self) -> None:
        """Frees threads."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=False, create=True
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    def _set_damaged_aside(self) -> None:
        for step in self.passed_over if multihost.is_leader() else ():
            path = self._directory / str(step)
            aside = path.with_name(f"{step}.damaged-{uuid.uuid4().hex[:8]}")
            path.rename(aside)
            _LOG.error("set the damaged checkpoint %d aside as %s", step, aside)
        if self.passed_over:
            self.passed_over = {}
            self.close()  # orbax remembers the steps

    def _remove_unfinished(self, *, is_own: bool = False) -> None:
        """What a killed process left, before the first save; or what this one could not finish."""
        is_due = (is_own or not self._has_saved) and multihost.is_leader()
        if is_due and self._directory.is_dir():
            for path in self._directory.glob(_UNFINISHED):
                shutil.rmtree(path, ignore_errors=is_own)
        self._has_saved = True

    def _restore(self, step: int, target_for: TargetFor, within: str) -> Restored:
        """Collective: a step that is damaged for one process is so for all."""
        error: _DamagedError | None = None
        body, arrays = {}, None
        try:
            body = self._body(step)
            target = self._matched_target(step, body, target_for, within)
            arrays = self._arrays(step, target, is_partial=bool(within))
        except _DamagedError as found:
            error = found
        _require_sound(error)
        found = _digests(arrays, everywhere=True)  # each process has read its own parts
        wrong = sorted(name for name in found if body["digests"][name] != found[name])
        if wrong:
            text = f"{len(wrong)} leaves do not match their digest, first {wrong[:3]}"
            error = _DamagedError(text)
        _require_sound(error)
        return Restored(step=step, arrays=arrays, record=body["record"])

    def _body(self, step: int) -> dict[str, Any]:
        """The verified JSON of a step: "record", "identity", "kinds" and "digests"."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        try:
            body = dict(self._read(step, args)["record"])
            digest = body.pop("digest")
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise _DamagedError(f"unreadable record: {error}") from error
        if digest != _json_digest(body):
            raise _DamagedError("the record does not match its digest")
        return body

    def _arrays(self, step: int, target: Any, *, is_partial: bool) -> Any:
        arrays = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=is_partial,
        )
        args = ocp.args.Composite(arrays=arrays)
        try:
            return self._read(step, args)["arrays"]
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise _DamagedError(f"unreadable arrays: {error}") from error

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        """Items of a step. Every process reads for itself: one that finds damage must not leave
        the others at a barrier of orbax."""
        here = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader_{here}"
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options)
        )
        with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
            return reader.restore(self._directory / str(step), args=args)

    def _matched_target(
        self, step: int, body: dict[str, Any], target_for: TargetFor, within: str
    ) -> Any:
        """The target for a step, which it matches: else CheckpointMismatchError."""
        self._require_identity(step, body)
        target = target_for(body["record"])
        kinds = {name: kind for name, kind in body["kinds"].items() if name.startswith(within)}
        wanted = _kinds(target)
        wrong = [name for name in {**kinds, **wanted} if kinds.get(name) != wanted.get(name)]
        if not wrong:
            return target
        name, more = wrong[0], f" (and {len(wrong) - 1} more leaves)" if len(wrong) > 1 else ""
        raise CheckpointMismatchError(
            f"checkpoint {step} of {self._directory} was made with other settings: {name} is "
            f"{kinds.get(name, 'absent')} in it, {wanted.get(name, 'absent')} now{more}. "
            "Fix: the settings in the run's config.json, or --workdir=NEW_DIR"
        )

    def _require_identity(self, step: int, body: dict[str, Any]) -> None:
        # Steps written before identities were recorded have none and cannot be told apart.
        written = body.get("identity", {})
        for name, own in self._identity.items():
            if written.get(name, own) != own:
                raise CheckpointMismatchError(
                    f"checkpoint {step} of {self._directory} was made with another {name}: "
                    f"{written[name]!r} in it, {own!r} now. Fix: --workdir=NEW_DIR"
                )


def _kinds(tree: Any) -> _LeafKinds:
    """Of arrays or shape structs."""
    return {
        path_name(path): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _require_sound(error: _DamagedError | None) -> None:
    """Collective: raises in all processes when one of them has an error."""
    if not multihost.agree(error is None):
        raise error or _DamagedError("another process of the learner found it so")


def _digests(tree: Any, *, everywhere: bool = False) -> dict[str, str]:
    """Collective: leaf path -> SHA-256 of its bytes in row-major order. One leaf at a time is on
    the host: on the leader's, or in all processes on theirs."""
    digests = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            leaf = multihost.gather(leaf, everywhere=everywhere)
            if leaf is None:
                continue
        array = np.ascontiguousarray(np.asarray(leaf))
        digests[path_name(path)] = hashlib.sha256(array.view(np.uint8).data).hexdigest()
    return digests


def _json_digest(body: dict[str, Any]) -> str:
    """SHA-256 of JSON that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
