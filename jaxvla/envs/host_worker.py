"""The worker's side of the host pool: the env protocol, and the loop that serves one env.

Consumes: requests from the pool. Produces: a frame in its row of the shared memory, then an
answer. Waits for: the next request. Is unblocked by: a request, or the end of the pool, which
ends the process even in the middle of a call.

Worker processes import this module and the env's own: keep JAX out of it.
"""

import json
import math
import mmap
import os
import queue
import socket
import threading
import traceback
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxvla.registry import Registry

MAX_MESSAGE_BYTES = 128 * 1024
"""Upper limit of a message, below the default send buffer of a Linux socket (208 KiB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFrame:
    """What an env shows: the host twin of `types.EnvObservation`, for one env."""

    images: np.ndarray
    """uint8 [C, h, w, 3], RGB, row 0 at the top."""
    state: np.ndarray
    """float32 [S]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkOutcome:
    """What an env answers to an action chunk."""

    reward: float
    """Sum over the executed steps."""
    success: bool
    """The episode ended by success inside the chunk."""
    num_steps: int
    """Control steps executed, in [1, n]."""
    frame: HostFrame | None
    """What the policy reads next; None after a success, when nothing reads it."""


class HostEnv(Protocol):
    """An environment that a worker process can serve. Built as `Class(config)`."""

    def reset(self, task: int, seed: int) -> HostFrame:
        """Starts an episode: a function of (task, seed), whatever ran before."""
        ...

    def step_chunk(self, actions: np.ndarray) -> ChunkOutcome:
        """Runs up to n actions, float32 [n, A]; stops after the step that succeeds."""
        ...


def serve(channel_fd: int, memory_fd: int, index: int) -> None:
    """Main function of a worker process: builds the env, then answers calls until the end.

    Args:
      channel_fd: the worker's end of the socket pair.
      memory_fd: the pool's shared memory.
      index: env, that is the row of the shared memory to write.
    """
    channel = socket.socket(fileno=channel_fd)
    hello = receive(channel)
    if hello is None:
        return
    images, state = map_rows(memory_fd, tuple(hello["image_shape"]), hello["state_dim"])
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(channel, requests), daemon=True).start()
    try:
        env = Registry("host env", {}).get(hello["env"])(hello["config"])
        while True:
            answer = _run_call(env, requests.get(), images[index], state[index])
            channel.sendall(encode(answer))
    except Exception as error:
        # The boundary of the process: the log gets the traceback, then the pool is told, which
        # kills this process at once.
        traceback.print_exc()
        channel.sendall(encode({"error": f"{type(error).__name__}: {error}"[:2000]}))
        raise SystemExit(1) from error


def _read_requests(channel: socket.socket, requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Passes requests on; ends the process, even in the middle of a call, with the pool's end."""
    while (request := receive(channel)) is not None:
        requests.put(request)
    os._exit(0)


def _run_call(
    env: HostEnv, request: dict[str, Any], images: np.ndarray, state: np.ndarray
) -> dict[str, Any]:
    """Runs one call, writes the frame into the env's rows and returns the answer."""
    if request["call"] == "reset":
        outcome = ChunkOutcome(
            reward=0.0,
            success=False,
            num_steps=0,
            frame=env.reset(request["task"], request["seed"]),
        )
    else:
        actions = np.array(request["actions"], np.float32)
        outcome = env.step_chunk(actions)
        if not 1 <= outcome.num_steps <= len(actions):
            raise ValueError(f"num_steps: expected 1 to {len(actions)}, got {outcome.num_steps}")
    if not math.isfinite(outcome.reward):
        raise ValueError(f"reward: expected a finite number, got {outcome.reward}")
    if outcome.frame is None and not outcome.success:
        raise ValueError("frame: missing, and the episode goes on")
    if outcome.frame is not None:
        # First: what is in the row may be seen when no other frame follows.
        if not np.isfinite(outcome.frame.state).all():
            raise ValueError(f"state: expected finite numbers, got {outcome.frame.state}")
        _write("images", outcome.frame.images, images)
        _write("state", outcome.frame.state, state)
    return {
        "reward": float(outcome.reward),
        "success": bool(outcome.success),
        "num_steps": int(outcome.num_steps),
    }


def _write(name: str, value: np.ndarray, row: np.ndarray) -> None:
    """Copies `value` into `row`; an env that changes shape or dtype is refused."""
    if value.dtype != row.dtype or value.shape != row.shape:
        expected = f"{row.dtype} {list(row.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {value.dtype} {list(value.shape)}")
    row[...] = value


def row_bytes(image_shape: tuple[int, ...], state_dim: int) -> int:
    """Shared memory that one env takes."""
    return 4 * state_dim + math.prod(image_shape)


def map_rows(
    memory_fd: int, image_shape: tuple[int, ...], state_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Maps the shared memory: all states first (they need the alignment), then all images.

    Returns:
      images, uint8 [E, C, h, w, 3], and state, float32 [E, S]; writable views.
    """
    num_envs = os.fstat(memory_fd).st_size // row_bytes(image_shape, state_dim)
    memory = mmap.mmap(memory_fd, 0)
    state = np.frombuffer(memory, np.float32, num_envs * state_dim)
    images = np.frombuffer(memory, np.uint8, offset=state.nbytes)
    return images.reshape(num_envs, *image_shape), state.reshape(num_envs, state_dim)


def encode(message: dict[str, Any]) -> bytes:
    """Writes a message as JSON; floats survive the round trip bit by bit.

    Raises:
      ValueError: it is larger than MAX_MESSAGE_BYTES.
    """
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(data)} bytes, more than {MAX_MESSAGE_BYTES} allowed")
    return data


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """Blocks for one message; None when the other side is gone."""
    try:
        data = channel.recv(MAX_MESSAGE_BYTES)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None
