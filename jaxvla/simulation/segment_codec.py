"""How a trajectory and its record cross from a simulator to the learner."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxvla.simulation.assembler import EpisodeStats, SegmentInfo
from jaxvla.transport.frames import FrameError
from jaxvla.transport.schema import TreeSchema, check_array, read_int
from jaxvla.types import Trajectory

_COUNTS = ("next_segment", "num_env_steps", "num_useful_env_steps", "num_queries", "num_invalid")
_EPISODES = {"task": np.int32, "success": np.bool_, "return_": np.float32, "length": np.int32}


class SegmentCodec:
    """Implements `transport.remote_queue.ItemCodec` for Trajectory and SegmentInfo.

    The arrays of a frame are the trajectory's leaves, those of the end state, the four of the
    episodes, and `is_uniform`.
    """

    def __init__(self, trajectory: Trajectory, end_states: Mapping[str, Any]):
        """Args:
        trajectory: shapes and dtypes of every trajectory.
        end_states: env group -> shapes and dtypes of its `SegmentInfo.end_state`.
        """
        self._trajectory = TreeSchema("trajectory", trajectory)
        self._end_states = {
            group: TreeSchema(f"end_state of {group}", struct)
            for group, struct in end_states.items()
        }

    def encode(
        self, payload: Trajectory, info: SegmentInfo
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """See ItemCodec."""
        arrays = [
            *self._trajectory.flatten(payload),
            *self._end_state(info.group).flatten(info.end_state),
            *(getattr(info.episodes, name) for name in _EPISODES),
            info.is_uniform,
        ]
        fields = {name: int(getattr(info, name)) for name in _COUNTS}
        self.decode(info.group, fields, arrays)
        return fields, arrays

    def decode(
        self, owner: str, fields: Mapping[str, Any], arrays: Sequence[np.ndarray]
    ) -> tuple[Trajectory, SegmentInfo]:
        """See ItemCodec."""
        end_state = self._end_state(owner)
        bounds = [len(self._trajectory), len(end_state), len(_EPISODES), 1]
        if len(arrays) != sum(bounds):
            raise FrameError(f"a trajectory of {len(arrays)} arrays, must have {sum(bounds)}")
        ends = np.cumsum(bounds)
        trajectory, state, episodes, (is_uniform,) = (
            arrays[end - size : end] for end, size in zip(ends, bounds, strict=True)
        )
        for array, (name, dtype) in zip(episodes, _EPISODES.items(), strict=True):
            check_array(array, f"episodes/{name}", dtype, (None,))
        if len({len(array) for array in episodes}) > 1:
            raise FrameError(f"episodes have {[len(array) for array in episodes]} entries")
        check_array(is_uniform, "is_uniform", np.bool_, (None,))
        return self._trajectory.unflatten(trajectory), SegmentInfo(
            group=owner,
            end_state=end_state.unflatten(state),
            episodes=EpisodeStats(**dict(zip(_EPISODES, episodes, strict=True))),
            is_uniform=is_uniform,
            **{name: read_int(fields, name) for name in _COUNTS},
        )

    def _end_state(self, group: str) -> TreeSchema:
        schema = self._end_states.get(group)
        if schema is None:
            raise FrameError(f"group = {group!r}, must be one of {sorted(self._end_states)}")
        return schema
