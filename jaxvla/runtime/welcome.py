"""What the learner tells a simulator when it connects: where each of its env groups goes on."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxvla.runtime.groups import Groups
from jaxvla.simulation.simulator import GroupSnapshot
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import TreeSchema, read_fields, read_int

KIND = "welcome"


class WelcomeCodec:
    """Snapshots of env groups as a frame, and back. Both sides have the same one."""

    def __init__(self, groups: Groups, names: tuple[str, ...]):
        """Args:
        groups: of the run.
        names: of the simulator's groups.
        """
        self._schemas = {
            name: TreeSchema(f"state of {name}", target)
            for name, target in groups.targets(names).items()
        }

    def encode(self, snapshots: Mapping[str, GroupSnapshot]) -> Frame:
        """The frame of those that there are; other groups begin anew."""
        segments: dict[str, int] = {}
        arrays: list[np.ndarray] = []
        for name, schema in self._schemas.items():
            if name in snapshots:
                segments[name] = snapshots[name].next_segment
                arrays += schema.flatten(snapshots[name].end_state)
        return Frame(kind=KIND, fields={"segments": segments}, arrays=arrays)

    def decode(self, frame: Frame) -> dict[str, GroupSnapshot]:
        """Raises FrameError when it is something else."""
        if frame.kind != KIND:
            raise FrameError(f"{frame.kind!r} is no welcome")
        segments: Mapping[str, Any] = read_fields(frame.fields, "segments")
        snapshots, arrays = {}, list(frame.arrays)
        for name, schema in self._schemas.items():
            if name not in segments:
                continue
            leaves, arrays = arrays[: len(schema)], arrays[len(schema) :]
            snapshots[name] = GroupSnapshot(
                next_segment=read_int(segments, name), end_state=schema.unflatten(leaves)
            )
        if arrays or segments.keys() - self._schemas.keys():
            raise FrameError("the welcome is of other env groups")
        return snapshots
