"""From an openpi request to a query of the batcher, and from its answer back."""

import asyncio
import dataclasses
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxvla import rng
from jaxvla.data.images import resize_with_pad_on_host
from jaxvla.models.prompts import tokenize_prompt
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.serving import wire
from jaxvla.serving.batcher import Batcher, Request
from jaxvla.serving.client import Answer, Query
from jaxvla.serving.requests import RequestError, RequestKeys, RequestReader, Responder
from jaxvla.serving.sampling import row_keys
from jaxvla.types import EnvSpec

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""

SPEC = EnvSpec(
    cameras=("front", "wrist"),
    image_size=8,
    state_dim=3,
    state_low=(0.0,) * 3,
    state_high=(1.0,) * 3,
    action_dim=4,
    action_names=("x", "y", "z", "grip"),
    tasks=("lift",),
    instructions=("lift it",),
    max_episode_steps=(5,),
    control_hz=10.0,
)
MAX_TOKENS = 12


def tokenize(text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    del state
    return tokenize_prompt(ByteTokenizer(), text, MAX_TOKENS)


def request_of(number: float = 0.25, prompt: str = "lift it") -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 10, 3), np.uint8)
    return {
        "observation/image": images[0],
        "observation/wrist_image": images[1],
        "observation/state": np.array([number, 0.5, -1.0]),
        "prompt": prompt,
    }


# ------------------------------------------------------------------------------- reader


def test_a_request_becomes_one_row() -> None:
    request = request_of()
    observation = RequestReader(SPEC, tokenize).read(request)
    for index, name in enumerate(("image", "wrist_image")):
        expected = resize_with_pad_on_host(request[f"observation/{name}"], 8, 8)
        np.testing.assert_array_equal(observation.images[0, index], expected)
    assert observation.images.shape == (1, 2, 8, 8, 3)
    assert np.asarray(observation.image_mask).tolist() == [[True, True]]
    assert observation.state.dtype == np.float32
    np.testing.assert_array_equal(observation.state, [[0.25, 0.5, -1.0]])
    ids, mask = tokenize("lift it", np.zeros(1))
    np.testing.assert_array_equal(observation.tokens, ids[None])
    np.testing.assert_array_equal(observation.token_mask, mask[None])


def test_a_third_camera_is_missing_and_a_fourth_refused() -> None:
    three = dataclasses.replace(SPEC, cameras=("front", "left", "right"))
    observation = RequestReader(three, tokenize).read(request_of())
    assert np.asarray(observation.image_mask).tolist() == [[True, True, False]]
    four = dataclasses.replace(SPEC, cameras=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="reads 4 cameras"):
        RequestReader(four, tokenize)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation/state": np.zeros(8)}, r"'observation/state' has shape \(8,\): send \[3\]"),
        ({"observation/state": np.full(3, 1e39)}, "'observation/state' .* 32-bit"),
        ({"observation/state": [None] * 3}, "'observation/state' .* no finite"),
        ({"observation/image": np.zeros((2, 2), np.uint8)}, "'observation/image' has shape"),
        ({"observation/wrist_image": {"a": 1}}, "'observation/wrist_image' has shape"),
        ({"prompt": "x" * MAX_TOKENS}, "'prompt': .* has 14 tokens, the limit max_tokens is 12"),
        ({"prompt": 7}, "'prompt' = 7"),
        ({"prompt": b"x" * 10**6}, "'prompt' = b'xx.* is no text"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        RequestReader(SPEC, tokenize).read(request_of() | changes)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("key", request_of())
def test_a_missing_key_is_named(key: str) -> None:
    request = request_of()
    del request[key]
    with pytest.raises(ValueError, match=f"has no '{key}'"):
        RequestReader(SPEC, tokenize).read(request)


# --------------------------------------------------------------------------------- keys


def test_keys_are_a_function_of_seed_and_counter() -> None:
    root = rng.root_key(3)
    blocks = [row_keys(rng.stream(root, "websocket", block), 256) for block in range(3)]
    keys = RequestKeys(root)
    taken = np.concatenate([keys.take() for _ in range(600)])
    np.testing.assert_array_equal(taken, np.concatenate(blocks)[:600])
    assert len(np.unique(taken, axis=0)) == 600
    other = RequestKeys(rng.root_key(4)).take()
    assert other.shape == (1, 2) and (other != taken[:1]).any()


def test_no_key_is_given_twice() -> None:
    keys = RequestKeys(rng.root_key(0))
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: keys.take()[0].tobytes(), range(1000)))
    assert len(set(taken)) == 1000


# ---------------------------------------------------------------------------- responder


class Rig:
    """A responder on a batcher that the test serves by hand."""

    def __init__(self, *, capacity_rows: int = 8) -> None:
        self.batcher = Batcher(
            trigger_rows=1, max_wait_s=0.0, max_rows=capacity_rows, capacity_rows=capacity_rows
        )
        keys = RequestKeys(rng.root_key(0))
        self.responder = Responder(
            reader=RequestReader(SPEC, tokenize), keys=keys, batcher=self.batcher
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *exception: object) -> None:
        self.responder.close()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def ask(self, request: Any) -> Future:
        data = request if isinstance(request, bytes) else wire.pack(request)
        return asyncio.run_coroutine_threadsafe(self.responder.answer(data), self._loop)

    def batch(self) -> tuple[Request, ...]:
        found = self.batcher.next_batch(TIMEOUT_S)
        assert found is not None and found.kind == "act"
        return found.requests


@dataclasses.dataclass
class Sample:
    actions: np.ndarray


def _answer(request: Request, actions: np.ndarray | None = None) -> None:
    """With actions that say what was asked."""
    query: Query = request.payload
    if actions is None:
        actions = np.full((1, 2, 4), np.asarray(query.observation.state)[0, 0], np.float32)
    request.future.set_result(Answer(result=Sample(actions=actions), policy_version=0))


def test_a_request_and_its_answer() -> None:
    with Rig() as rig:
        future = rig.ask(request_of(0.75))
        (request,) = rig.batch()
        query: Query = request.payload
        assert request.rows == 1
        np.testing.assert_array_equal(query.keys, RequestKeys(rng.root_key(0)).take())
        _answer(request)
        answer = future.result(TIMEOUT_S)
        assert set(answer) == {"actions", "policy_timing"}
        assert answer["policy_timing"]["infer_ms"] >= 0
        assert answer["actions"].dtype == np.float32
        np.testing.assert_array_equal(answer["actions"], np.full((2, 4), 0.75))
        assert not rig.batcher._clients


def test_who_asks_nothing_holds_nobody_back() -> None:
    """Requests that are answered are no live clients; those that wait are, so they share."""
    with Rig() as rig:
        for number in range(3):
            future = rig.ask(request_of(number))
            (request,) = rig.batch()
            _answer(request)
            future.result(TIMEOUT_S)
            assert not rig.batcher._clients
        futures = [rig.ask(request_of(0))]
        (running,) = rig.batch()
        submitted = threading.Semaphore(0)
        submit = rig.batcher.submit

        def counted(**query: Any) -> Future:
            future = submit(**query)
            submitted.release()
            return future

        rig.batcher.submit = counted
        futures += [rig.ask(request_of(number)) for number in (1, 2, 3)]
        for _ in range(3):
            assert submitted.acquire(timeout=TIMEOUT_S)
        _answer(running)
        together = rig.batch()
        assert len(together) == 3
        for request in together:
            _answer(request)
        found = [future.result(TIMEOUT_S)["actions"][0, 0] for future in futures]
        assert found == [0, 1, 2, 3]
        assert not rig.batcher._clients


@pytest.mark.parametrize(
    ("request_or_bytes", "message"),
    [
        (b"\xc1", "cannot be read as msgpack"),
        ({"prompt": "x"}, "has no 'observation/image'"),
        (request_of(1e300), "32-bit"),
    ],
)
def test_a_bad_request_is_a_request_error(request_or_bytes: Any, message: str) -> None:
    with Rig() as rig:
        with pytest.raises(RequestError, match=message):
            rig.ask(request_or_bytes).result(TIMEOUT_S)
        assert not rig.batcher._clients


def test_a_full_server_says_so() -> None:
    with Rig(capacity_rows=1) as rig:
        rig.batcher.register("another")
        waiting = rig.batcher.submit(rows=1, client="another", kind="act", payload=None)
        with pytest.raises(RequestError, match="the server is busy: 1 rows are waiting"):
            rig.ask(request_of()).result(TIMEOUT_S)
        assert rig.batcher._clients == {"another"} and not waiting.done()


def test_a_server_that_stops_says_so() -> None:
    with Rig() as rig:
        submitted = threading.Event()
        submit = rig.batcher.submit

        def told(**query: Any) -> Future:
            future = submit(**query)
            submitted.set()
            return future

        rig.batcher.submit = told
        waiting = rig.ask(request_of())
        assert submitted.wait(TIMEOUT_S)
        rig.batcher.close("shutdown")
        with pytest.raises(RequestError, match="the server stops: shutdown"):
            waiting.result(TIMEOUT_S)
        with pytest.raises(RequestError, match="the server stops: shutdown"):
            rig.ask(request_of()).result(TIMEOUT_S)
        assert not rig.batcher._clients


@pytest.mark.parametrize("is_running", [False, True])
def test_a_request_that_is_given_up_is_forgotten(is_running: bool) -> None:
    """The websocket's deadline cancels it; what is in a batch already is computed for nobody."""
    with Rig() as rig:
        left = threading.Event()
        unregister = rig.batcher.unregister

        def told(client: str) -> None:
            unregister(client)
            left.set()

        rig.batcher.unregister = told
        registered = threading.Event()
        submit = rig.batcher.submit

        def submitted(**query: Any) -> Future:
            future = submit(**query)
            registered.set()
            return future

        rig.batcher.submit = submitted
        future = rig.ask(request_of())
        assert registered.wait(TIMEOUT_S)
        running = rig.batch() if is_running else ()
        future.cancel()
        for request in running:
            _answer(request)
        assert left.wait(TIMEOUT_S)
        assert not rig.batcher._clients
        assert rig.batcher.next_batch(0.0) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_reach_no_robot(value: float) -> None:
    with Rig() as rig:
        future = rig.ask(request_of())
        (request,) = rig.batch()
        _answer(request, np.full((1, 2, 4), value, np.float32))
        with pytest.raises(RuntimeError, match="not finite") as raised:
            future.result(TIMEOUT_S)
        assert not isinstance(raised.value, RequestError)


def test_what_the_policy_server_raises_is_no_request_error() -> None:
    with Rig() as rig:
        future = rig.ask(request_of())
        (request,) = rig.batch()
        request.future.set_exception(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory") as raised:
            future.result(TIMEOUT_S)
        assert not isinstance(raised.value, RequestError)
