"""What openpi's clients ask, in the terms of our policy server: a request in, a chunk out.

consumes    requests as bytes, from the connections of the websocket server
produces    queries to the batcher; answers as dicts
waits for   the batch that a request is in
unblocked by  the policy server

A request is a live client of the batcher from its submission until its answer. So a connection
that is silent holds nobody back, and whatever waits when the policy server becomes free shares
its next forward.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxvla import rng
from jaxvla.data.transforms import CAMERAS, libero_inputs
from jaxvla.serving import wire
from jaxvla.serving.batcher import Batcher, BatcherClosedError, Busy
from jaxvla.serving.client import Answer, InferenceClient
from jaxvla.serving.sampling import row_keys
from jaxvla.types import EnvSpec, Observation, stand_in

KIND = "act"
"""The deterministic policy, given the noise that the flow starts from."""

_NUM_READERS = 4
"""Threads that decode requests and resize their images."""

_KEYS_AT_ONCE = 256


class RequestError(ValueError):
    """A request that gets an error for an answer. The text is for the client to read."""


class RequestReader:
    """Turns requests under openpi's keys for LIBERO into observations. Thread-safe."""

    def __init__(
        self, spec: EnvSpec, tokenize: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Args:
          spec: of the env that the policy acts in.
          tokenize: (instruction, state [S] in the env's units) -> ids int32 [N] and mask
            bool [N]; raises ValueError.

        Raises:
          ValueError: openpi's clients do not have as many cameras.
        """
        if len(spec.cameras) > len(CAMERAS):
            raise ValueError(
                f"the policy reads {len(spec.cameras)} cameras {spec.cameras}; openpi's requests "
                f"have at most {len(CAMERAS)}"
            )
        self._spec = spec
        self._tokenize = tokenize

    def read(self, request: Mapping[str, Any]) -> Observation:
        """One row of numpy arrays, in raw units; images have the model's size.

        Args:
          request: see `libero_inputs`; sizes are those of the env.

        Raises:
          ValueError: a key is missing, or its value does not fit the env or the prompt's limit.
        """
        spec = self._spec
        inputs = libero_inputs(
            request,
            spec.image_size,
            num_cameras=len(spec.cameras),
            state_dim=spec.state_dim,
            action_dim=spec.action_dim,
        )
        try:
            tokens, mask = self._tokenize(inputs.prompt, inputs.state)
        except ValueError as error:
            raise ValueError(f"'prompt': {error}") from error
        rows = [
            inputs.images,
            inputs.image_mask,
            _float32("observation/state", inputs.state),
            tokens,
            mask,
        ]
        images, image_mask, state, tokens, mask = (stand_in(np.asarray(row)[None]) for row in rows)
        return Observation(
            images=images, image_mask=image_mask, state=state, tokens=tokens, token_mask=mask
        )


class RequestKeys:
    """Noise of the requests: the n-th taken gets the n-th key of a run's stream. Thread-safe."""

    def __init__(self, root: jax.Array) -> None:
        """Args: root key of the run. Draws the first keys, so that nothing compiles later."""
        self._root = root
        self._lock = threading.Lock()
        self._num_blocks = 0
        self._keys: list[np.ndarray] = []
        self._draw()

    def take(self) -> np.ndarray:
        """uint32 [1, 2], see `serving.sampling.row_keys`."""
        with self._lock:
            if not self._keys:
                self._draw()
            return self._keys.pop()

    def _draw(self) -> None:
        key = rng.stream(self._root, "websocket", self._num_blocks)
        self._num_blocks += 1
        keys = row_keys(key, _KEYS_AT_ONCE)
        self._keys = [keys[index : index + 1] for index in reversed(range(len(keys)))]


class Responder:
    """Answers requests through a batcher."""

    def __init__(self, *, reader: RequestReader, keys: RequestKeys, batcher: Batcher) -> None:
        """Args:
        reader: of the policy's observations.
        keys: of the run.
        batcher: the policy server's.
        """
        self._reader = reader
        self._keys = keys
        self._batcher = batcher
        self._lock = threading.Lock()
        self._num_asked = 0
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="serving/reader")

    async def answer(self, data: bytes) -> dict[str, Any]:
        """Answers one request.

        Args:
          data: a request, see `wire` and `RequestReader`.

        Returns:
          "actions" float32 [H, A] in env units, and "policy_timing" with "infer_ms", from the
          submission to the batcher until its answer, hence with the time in its queue.

        Raises:
          RequestError: the request is wrong, or the server has no time for it.
          Exception: the policy failed.
        """
        loop = asyncio.get_running_loop()
        observation = await loop.run_in_executor(self._readers, self._read, data)
        start_s = time.monotonic()
        try:
            answer: Answer = await asyncio.wrap_future(self._submit(observation))
        except Busy as error:
            raise RequestError(f"the server is busy: {error}. Fix: ask again later") from error
        except BatcherClosedError as error:
            raise RequestError(f"the server stops: {error}. Fix: ask another one") from error
        infer_ms = 1e3 * (time.monotonic() - start_s)
        actions = np.asarray(answer.result.actions[0], np.float32)
        if not np.isfinite(actions).all():
            raise RuntimeError("the policy's actions are not finite")
        return {"actions": actions, "policy_timing": {"infer_ms": infer_ms}}

    def close(self) -> None:
        """Ends the threads that read requests, without waiting for them."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _read(self, data: bytes) -> Observation:
        try:
            return self._reader.read(wire.unpack(data))
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _submit(self, observation: Observation) -> Future:
        with self._lock:
            self._num_asked += 1
            client = InferenceClient(self._batcher, f"request_{self._num_asked}")
        client.join()
        try:
            future = client.submit(KIND, observation, self._keys.take())
        except BaseException:
            client.leave()
            raise
        # In the thread of the policy server, so that the next batch does not wait for this client.
        future.add_done_callback(lambda _: client.leave())
        return future


def _float32(key: str, values: np.ndarray) -> np.ndarray:
    """Raises ValueError where float32 cannot hold a value."""
    if np.abs(values).max(initial=0) > np.finfo(np.float32).max:
        raise ValueError(f"{key!r} = {values} does not fit into 32-bit floating point")
    return values.astype(np.float32)
