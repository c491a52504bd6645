"""What a chunk query and its answer look like on their way between processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxvla.serving.client import Query
from jaxvla.transport.frames import FrameError
from jaxvla.transport.schema import TreeSchema, check_array, shown
from jaxvla.types import Observation

_KEY_WORDS = 2


class InferenceSchema:
    """Both sides hold the same one, made from the same config.

    The arrays of a query are the observation's leaves, [rows, ...], then its keys; those of an
    answer are the leaves of its result, [rows, ...].
    """

    def __init__(self, observation: Observation, results: Mapping[str, Any]):
        """Args:
        observation: shapes and dtypes; the number of rows is not read.
        results: kind of query -> shapes and dtypes of what it gets, such as a PolicySample.
        """
        self._observation = TreeSchema("observation", observation, is_batch=True)
        self._results = {
            kind: TreeSchema(f"result of {kind}", struct, is_batch=True)
            for kind, struct in results.items()
        }

    def check_kind(self, kind: Any) -> None:
        """Raises FrameError when there is no such kind of query."""
        if kind not in self._results:
            raise FrameError(f"kind = {shown(kind)}, must be one of {sorted(self._results)}")

    def pack_query(
        self, kind: str, observation: Observation, keys: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Arrays of a query. Raises FrameError for what the server would refuse."""
        arrays = [*self._observation.flatten(observation), np.asarray(keys)]
        self.unpack_query(kind, arrays)
        return arrays

    def unpack_query(self, kind: str, arrays: Sequence[np.ndarray]) -> Query:
        """The query. Raises FrameError, which names the leaf."""
        self.check_kind(kind)
        if not arrays:
            raise FrameError("a query without arrays")
        *leaves, keys = arrays
        check_array(keys, "keys", np.uint32, (None, _KEY_WORDS))
        observation = self._observation.unflatten(leaves)
        if len(leaves[0]) != len(keys):
            raise FrameError(f"observation has {len(leaves[0])} rows, keys {len(keys)}")
        return Query(observation=observation, keys=keys)

    def pack_result(self, kind: str, result: Any) -> Sequence[np.ndarray]:
        """Arrays of an answer. Raises FrameError for what the client would refuse."""
        return self._results[kind].flatten(result)

    def unpack_result(self, kind: str, rows: int, arrays: Sequence[np.ndarray]) -> Any:
        """The result for a query of so many rows. Raises FrameError, which names the leaf."""
        result = self._results[kind].unflatten(arrays)
        if len(arrays[0]) != rows:
            raise FrameError(f"result of {kind} has {len(arrays[0])} rows, {rows} were asked for")
        return result
