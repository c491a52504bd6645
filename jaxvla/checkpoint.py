"""Checkpoints that are atomic, verified, and restored only against a known structure.

A step holds two items: `arrays`, a pytree of arrays (orbax), and `record`, JSON with
counters and the SHA-256 of every leaf. Orbax makes a step visible only when all of it is
written. It does not notice flipped bytes in a data file, hence the digests: a step that
does not match is skipped with a loud message in favour of the one before it.
"""

import hashlib
import logging
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxvla.sharding import path_name

_LOG = logging.getLogger(__name__)


class CorruptCheckpointError(RuntimeError):
    """Every checkpoint of the work directory is damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A checkpoint that passed verification."""

    step: int
    arrays: Any
    """As the target given to `restore`."""
    record: dict[str, Any]
    """The JSON record given to `save`."""


class Checkpointer:
    """Checkpoints of one work directory."""

    def __init__(self, directory: pathlib.Path, *, keep: int):
        """Args: the directory (made when first written), and how many newest steps to keep."""
        self._directory = directory.resolve()
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Complete steps, oldest first. Writes nothing."""
        if not self._directory.is_dir():
            return []
        return sorted(self._open().all_steps())

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Writes a step and returns when it is complete. An existing step stays as it is.

        Args:
          step: learner update.
          arrays: pytree of arrays.
          record: JSON-serialisable counters.
        """
        manager = self._open()
        if step in manager.all_steps():
            return
        manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(arrays),
                record=ocp.args.JsonSave({"record": record, "digests": _digests(arrays)}),
            ),
        )
        manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a step, without its arrays and without verification."""
        items = self._open().restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        return items["record"]["record"]

    def restore(self, target_for: Any) -> Restored | None:
        """The newest step that passes verification, or None when there is no step.

        Args:
          target_for: function from a step's record to the pytree of arrays or shape structs
            (with shardings) that the step must match; nothing else is read from the files.

        Raises:
          CorruptCheckpointError: there are steps, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore(step, target_for)
            except (ValueError, KeyError, OSError) as error:
                _LOG.error("checkpoint %d is damaged and was passed over: %s", step, error)
        if steps:
            raise CorruptCheckpointError(
                f"no checkpoint in {self._directory} passes verification (steps {steps}); "
                "see logs, or start anew with another --workdir"
            )
        return None

    def close(self) -> None:
        """Waits for writes and frees threads."""
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

    def _restore(self, step: int, target_for: Any) -> Restored:
        manager = self._open()
        stored = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        record, digests = stored["record"]["record"], stored["record"]["digests"]
        target = target_for(record)
        arrays = manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeRestore(
                    target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
                )
            ),
        )["arrays"]
        found = _digests(arrays)
        wrong = sorted(name for name in found if digests.get(name) != found[name])
        if wrong or len(found) != len(digests):
            raise ValueError(f"{len(wrong)} leaves do not match their digest, first {wrong[:3]}")
        return Restored(step=step, arrays=arrays, record=record)


def _digests(tree: Any) -> dict[str, str]:
    """Leaf path -> SHA-256 over dtype, shape and bytes."""
    digests = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(np.asarray(leaf))
        digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
        digests[path_name(path)] = digest.hexdigest()
    return digests
