"""Chunk queries over real connections: the same answers, and none lost when connections are."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import pytest
import test_server as in_process
from fault_rows import FaultRow
from local_connections import CONFIG, TIMEOUT_S, in_thread
from serving.tiny_policy import TinyPolicy
from simulation.counter_env import CounterEnv
from test_server import Rig, keys_of, observation_of, require

from jaxvla.serving.batcher import Batcher, BatcherClosedError, Busy, Expired
from jaxvla.serving.client import Answer, InferenceClient, QueryClient, ServerLostError, gather
from jaxvla.serving.remote import InferenceService
from jaxvla.serving.remote_client import RemoteInferenceClient, ServerGoneError, ServerLink
from jaxvla.serving.remote_schema import InferenceSchema
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.transport.channel import Connection, Listener, connect
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.types import Observation

ECHO = {
    "id": np.zeros(1, np.float32),
    "key": np.zeros((1, 2), np.uint32),
    "weights": np.zeros(1, np.float32),
}
"""What the sampler of `Rig` answers."""
SCHEMA = InferenceSchema(observation_of((1,)), {"explore": ECHO, "value": ECHO})


class Host:
    """A policy server's address; connections can be cut."""

    def __init__(self, batcher: Batcher, session: str = "s1", schema: InferenceSchema = SCHEMA):
        self.service = InferenceService(batcher, schema, session=session)
        self.connections: list[Connection] = []
        self.has_connection = threading.Semaphore(0)
        self._listener = Listener("127.0.0.1", 0, CONFIG, self._serve)
        self._listener.start()

    @property
    def address(self) -> tuple[str, int]:
        return self._listener.address

    def _serve(self, connection: Connection) -> None:
        self.connections.append(connection)
        self.has_connection.release()
        self.service.serve(connection)

    def cut(self) -> None:
        """Ends all connections."""
        for connection in list(self.connections):
            connection.close()

    def close(self) -> None:
        self.service.close()
        self._listener.close()


@contextlib.contextmanager
def linked(
    find_address: Callable[[], Any],
    *,
    schema: InferenceSchema = SCHEMA,
    session: str = "s1",
    patience_s: float = TIMEOUT_S,
    **options: Any,
) -> Iterator[ServerLink]:
    link = ServerLink(
        find_address,
        CONFIG,
        schema,
        name="simulator_0",
        session=session,
        patience_s=patience_s,
        **options,
    )
    link.start()
    try:
        yield link
    finally:
        link.close("finished")


class WatchedBatcher(Batcher):
    """Tells when something has come over a connection, and what became of it."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.outcomes: Any = []
        self.has_outcome = threading.Semaphore(0)

    def _note(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        error = None
        try:
            return call(*args, **kwargs)
        except Exception as raised:
            error = raised
            raise
        finally:
            self.outcomes.append(error)
            self.has_outcome.release()

    def submit(self, **request: Any) -> Future:
        return self._note(super().submit, **request)

    def unregister(self, client: str) -> None:
        self._note(super().unregister, client)

    def register(self, client: str) -> None:
        self._note(super().register, client)

    def outcome(self) -> Any:
        """What the next call gave: None or an error."""
        assert self.has_outcome.acquire(timeout=TIMEOUT_S)
        return self.outcomes.pop(0)


class PromptClient(QueryClient):
    """Returns once the server has the message, as tests of one process expect."""

    def __init__(self, client: RemoteInferenceClient, batcher: WatchedBatcher):
        self.name = client.name
        self._client = client
        self._batcher = batcher

    def join(self) -> None:
        self._client.join()
        assert self._batcher.outcome() is None

    def leave(self) -> None:
        self._client.leave()
        assert self._batcher.outcome() is None

    def submit(self, kind: str, observation: Any, keys: np.ndarray) -> Future:
        future = self._client.submit(kind, observation, keys)
        if self._batcher.outcome() is not None:
            error = future.exception(TIMEOUT_S)
            assert error is not None
            raise error
        return future


class RemoteRig(Rig):
    """The running policy server of `Rig`, whose clients are elsewhere."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RemoteRig":
        batcher: Any = self.batcher
        batcher.__class__ = WatchedBatcher
        batcher.outcomes, batcher.has_outcome = [], threading.Semaphore(0)
        self.host = Host(batcher)
        self._stack.callback(self.host.close)
        self.link = self._stack.enter_context(linked(lambda: self.host.address))
        assert self.host.has_connection.acquire(timeout=TIMEOUT_S)
        self.clients: Any = [
            PromptClient(RemoteInferenceClient(self.link, f"client_{i}"), batcher) for i in range(3)
        ]
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        super().__exit__(*exception)


@pytest.mark.parametrize(
    "test",
    [
        in_process.test_every_client_gets_its_own_rows,
        in_process.test_weights_change_between_batches_only_and_are_staged_during_one,
        in_process.test_above_capacity_the_answer_is_busy,
        in_process.test_shutdown_answers_everything_that_is_pending,
        in_process.test_a_client_that_leaves_takes_its_request_along,
    ],
    ids=lambda test: test.__name__,
)
def test_like_the_server_in_process(monkeypatch: Any, test: Any) -> None:
    monkeypatch.setattr(in_process, "Rig", RemoteRig)
    test()


# ------------------------------------------------------------------------------- the answers


def test_answers_do_not_depend_on_the_way() -> None:
    """A real policy, whose samples are pytrees with a trace: the same bits."""
    spec, random = CounterEnv.spec, np.random.default_rng(0)
    policy = TinyPolicy(spec)
    params = policy.init(jax.random.key(0))
    act = jax.jit(lambda obs, keys: policy.act(params, obs, _typed(keys), explore=True))
    arrays: dict[str, Any] = {
        "images": random.integers(
            0, 256, (2, len(spec.cameras), spec.image_size, spec.image_size, 3), np.uint8
        ),
        "image_mask": np.ones((2, len(spec.cameras)), bool),
        "state": random.normal(size=(2, spec.state_dim)).astype(np.float32),
        "tokens": np.ones((2, 3), np.int32),
        "token_mask": np.ones((2, 3), bool),
    }
    observation, keys = Observation(**arrays), keys_of((3, 5))
    sample = jax.device_get(act(observation, keys))
    schema = InferenceSchema(observation, {"explore": sample})
    batcher = Batcher(trigger_rows=1, max_wait_s=0.0, max_rows=2, capacity_rows=4)

    def serve() -> None:
        while (batch := batcher.next_batch(TIMEOUT_S)) is not None:
            for request in batch.requests:
                query = request.payload
                result = jax.device_get(act(query.observation, query.keys))
                request.future.set_result(Answer(result=result, policy_version=3))

    host = Host(batcher, schema=schema)
    serving = in_thread(serve)
    with linked(lambda: host.address, schema=schema) as link:
        answers = []
        for client in (InferenceClient(batcher, "near"), RemoteInferenceClient(link, "far")):
            client.join()
            answers.append(client.submit("explore", observation, keys).result(TIMEOUT_S))
            client.leave()
    host.close()
    batcher.close("finished")
    serving.result(TIMEOUT_S)
    near, far = answers
    assert near.policy_version == far.policy_version == 3
    assert jax.tree.structure(near.result) == jax.tree.structure(far.result)
    for one, other in zip(jax.tree.leaves(near.result), jax.tree.leaves(far.result), strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _typed(keys: Any) -> jax.Array:
    return jax.random.wrap_key_data(keys, impl="threefry2x32")


def test_a_routed_client_takes_ways_of_both_kinds() -> None:
    with RemoteRig() as rig:
        rig.publish(0)
        near = InferenceClient(rig.batcher, "group")
        far = RemoteInferenceClient(rig.link, "group")
        client = RoutedClient([far, near], Router(2, {"group": 0}), rows=1)
        client.join()
        require(client.submit("explore", observation_of((4,)), keys_of((4,))), [4], 0)
        client.leave()


# ------------------------------------------------------------------------- loss and return


@pytest.mark.fault(11)
def test_a_lost_answer_is_asked_for_again_and_is_the_same() -> None:
    with RemoteRig() as rig:
        rig.publish(0)
        hold = rig.hold()
        lost = rig.ask(0, 1, 2)
        hold.wait()
        rig.host.cut()
        with pytest.raises(ServerLostError):
            lost.result(TIMEOUT_S)
        hold.release()
        client = RemoteInferenceClient(rig.link, "client_0")  # joined; asks when it is back
        again = client.submit("explore", observation_of((1, 2)), keys_of((1, 2)))
        require(again, [1, 2], 0)


def test_gather_asks_again_while_others_wait() -> None:
    with RemoteRig() as rig:
        rig.publish(0)
        hold = rig.hold()
        first = RemoteInferenceClient(rig.link, "client_0")
        second = RemoteInferenceClient(rig.link, "client_1")
        asks = [
            lambda: first.submit("explore", observation_of((1,)), keys_of((1,))),
            lambda: second.submit("explore", observation_of((2,)), keys_of((2,))),
        ]
        answers = in_thread(lambda: gather(asks))
        hold.wait()
        rig.host.cut()
        hold.release()
        assert [x.result["id"].tolist() for x in answers.result(TIMEOUT_S)] == [[1.0], [2.0]]


def make_batcher(**options: Any) -> WatchedBatcher:
    """In lockstep: fires when every client has asked."""
    limits: dict[str, Any] = {"trigger_rows": 8, "max_wait_s": float("inf"), "max_rows": 8}
    return WatchedBatcher(**(limits | {"capacity_rows": 8} | options))


def dial(host: Host, name: str = "raw", session: str = "s1") -> Connection:
    connection = connect(host.address, CONFIG, name=name, timeout_s=TIMEOUT_S)
    connection.send(Frame(kind="client", fields={"session": session}))
    return connection


def say(connection: Connection, kind: str, client: str, **fields: Any) -> None:
    fields = {"session": "s1", "client": client, **fields}
    connection.send(Frame(kind=kind, fields=fields))


def test_a_dead_simulator_is_waited_for_by_nobody() -> None:
    batcher = make_batcher()
    host = Host(batcher)
    with linked(lambda: host.address) as link:
        client = RemoteInferenceClient(link, "alive")
        client.join()
        assert batcher.outcome() is None
        dead = dial(host)
        assert dead.receive().kind == "welcome"
        say(dead, "join", "dead")
        assert batcher.outcome() is None
        arrays = SCHEMA.pack_query("explore", observation_of((1,)), keys_of((1,)))
        fields = {"session": "s1", "client": "dead", "number": 0, "kind": "explore"}
        dead.send(Frame(kind="ask", fields=fields, arrays=arrays))
        assert batcher.outcome() is None
        assert batcher.waiting_rows == 1
        dead.close()
        assert batcher.outcome() is None  # unregistered, and what it had waiting is gone
        assert batcher.waiting_rows == 0
        future = client.submit("explore", observation_of((2,)), keys_of((2,)))
        batch = batcher.next_batch(TIMEOUT_S)
        assert batch is not None and [x.client for x in batch.requests] == ["alive"]
        batch.requests[0].future.set_exception(Expired("waited"))
        with pytest.raises(Expired, match="waited"):
            future.result(TIMEOUT_S)
    host.close()


def test_a_simulator_that_comes_back_takes_its_clients_over() -> None:
    batcher = make_batcher()
    host = Host(batcher)
    half_open = dial(host)
    assert half_open.receive().kind == "welcome"
    say(half_open, "join", "group_0")
    assert batcher.outcome() is None
    with linked(lambda: host.address) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        assert (batcher.outcome(), batcher.outcome()) == (None, None)
        client.submit("explore", observation_of((2,)), keys_of((2,)))
        assert batcher.next_batch(TIMEOUT_S) is not None  # nobody else is registered
        connections = in_thread(half_open.receive)
        assert connections.exception(TIMEOUT_S) is not None
    host.close()


def test_clients_join_again_before_they_ask_elsewhere() -> None:
    """The server comes back under another address; only who had not left joins it."""
    batchers = make_batcher(), make_batcher()
    hosts = [Host(batcher) for batcher in batchers]
    where = [hosts[0].address]
    with linked(lambda: where[0]) as link:
        clients = [RemoteInferenceClient(link, name) for name in "abc"]
        for client in clients:
            client.join()
            assert batchers[0].outcome() is None
        clients[1].leave()
        assert batchers[0].outcome() is None
        where[0] = hosts[1].address
        hosts[0].close()
        for _ in "ac":
            assert batchers[1].outcome() is None
        for client in (clients[0], clients[2]):
            client.submit("explore", observation_of((2,)), keys_of((2,)))
        batch = batchers[1].next_batch(TIMEOUT_S)
        assert batch is not None and [x.client for x in batch.requests] == ["a", "c"]
    hosts[1].close()


class Clock:
    """Seconds that pass only when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_patience_ends() -> None:
    """Counted from the first loss, whatever comes and goes meanwhile."""
    clock, asked = Clock(), threading.Semaphore(0)

    def find_address() -> None:
        asked.release()

    with linked(find_address, patience_s=10.0, clock=clock) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        future = client.submit("explore", observation_of((2,)), keys_of((2,)))
        clock.now_s = 9.9
        for _ in range(4):
            assert asked.acquire(timeout=TIMEOUT_S)
        assert not future.done()
        clock.now_s = 10.0
        with pytest.raises(ServerGoneError, match="for 10 s"):
            gather([lambda: future])


@pytest.mark.fault(10)
def test_a_server_that_dies_of_a_request_is_not_asked_for_ever() -> None:
    clock, batcher = Clock(), make_batcher()
    host = Host(batcher)
    with linked(lambda: host.address, patience_s=10.0, clock=clock) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        answers = in_thread(
            lambda: gather([lambda: client.submit("explore", observation_of((2,)), keys_of((2,)))])
        )
        for now_s in (0.0, 6.0, 12.0):
            batch = None
            while batch is None:  # woken by a client that leaves
                batch = batcher.next_batch(TIMEOUT_S)
            clock.now_s = now_s
            host.cut()
        with pytest.raises(ServerGoneError):
            answers.result(TIMEOUT_S)
    host.close()


def test_another_session_is_refused_until_it_is_the_same() -> None:
    old, new = Host(make_batcher(), "s0"), Host(make_batcher(trigger_rows=1), "s1")
    where, asked = [old.address], threading.Semaphore(0)

    def find_address() -> Any:
        asked.release()
        return where[0]

    with linked(find_address) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        client.submit("explore", observation_of((2,)), keys_of((2,)))
        for _ in range(3):
            assert asked.acquire(timeout=TIMEOUT_S)
        assert old.service.batcher.waiting_rows == 0
        where[0] = new.address
        assert new.service.batcher.next_batch(TIMEOUT_S) is not None
    for host in (old, new):
        host.close()


@pytest.mark.parametrize("kind", ["join", "ask", "leave"])
def test_every_message_names_the_session(kind: str) -> None:
    batcher = make_batcher()
    host = Host(batcher)
    connection = dial(host)
    assert connection.receive().kind == "welcome"
    say(connection, kind, "group_0", session="s0")
    assert in_thread(connection.receive).exception(TIMEOUT_S) is not None
    assert batcher.outcomes == []
    host.close()


def test_close_ends_what_waits_for_a_server() -> None:
    with linked(lambda: None) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        future = client.submit("explore", observation_of((2,)), keys_of((2,)))
        link.close("shutdown")
        for call in (
            lambda: future.result(TIMEOUT_S),
            lambda: client.submit("explore", observation_of((2,)), keys_of((2,))),
        ):
            with pytest.raises(BatcherClosedError, match="shutdown"):
                call()
        client.leave()


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("is_joined", [True, False])
def test_joining_twice_and_asking_or_leaving_unjoined_is_refused(is_joined: bool) -> None:
    with linked(lambda: None) as link:
        client = RemoteInferenceClient(link, "group_0")
        calls: list[Callable[[], Any]] = [client.join]
        if is_joined:
            client.join()
        else:
            calls = [
                client.leave,
                lambda: client.submit("explore", observation_of((2,)), keys_of((2,))),
            ]
        for call in calls:
            with pytest.raises(ValueError, match=r"is .*registered"):
                call()


WRONG = [
    (lambda arrays: [*arrays[:2], arrays[2].astype(np.float64), *arrays[3:]], "observation/state"),
    (lambda arrays: [arrays[0][:, :, :1], *arrays[1:]], "observation/images"),
    (lambda arrays: [*arrays[:-1], arrays[-1].astype(np.int32)], "keys is int32"),
    (lambda arrays: [*arrays[:-1], arrays[-1][:1]], "2 rows, keys 1"),
    (lambda arrays: [*arrays[:1], arrays[1][:1], *arrays[2:]], r"leaves of \[1, 2\] rows"),
    (lambda arrays: arrays[:-1], "leaves|keys"),
    (lambda arrays: [], "without arrays"),
    (lambda arrays: [x[:0] for x in arrays], "request of 0 rows"),
    (lambda arrays: [np.repeat(x, 5, 0) for x in arrays], "request of 10 rows"),
]


@pytest.mark.fault(33)
@pytest.mark.parametrize(("change", "message"), WRONG)
def test_malformed_query_gets_an_error_and_harms_nobody(
    monkeypatch: Any, change: Any, message: str, fault_row: FaultRow
) -> None:
    with RemoteRig() as rig:
        rig.publish(0)
        arrays = SCHEMA.pack_query("explore", observation_of((1, 2)), keys_of((1, 2)))
        wrong: Any = change(arrays)
        client = RemoteInferenceClient(rig.link, "client_0")
        with monkeypatch.context() as patch:
            patch.setattr(SCHEMA, "pack_query", lambda *query: wrong)
            future = client.submit("explore", observation_of((1,)), keys_of((1,)))
        with pytest.raises(ValueError, match=message):
            future.result(TIMEOUT_S)
        again = client.submit("explore", observation_of((3,)), keys_of((3,)))
        require(again, [3], 0)
    fault_row(survived=True)


def test_the_client_refuses_it_first() -> None:
    with linked(lambda: None) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        with pytest.raises(FrameError, match="kind = 'dream', must be one of"):
            client.submit("dream", observation_of((1,)), keys_of((1,)))
        with pytest.raises(FrameError, match="2 rows, keys 1"):
            client.submit("explore", observation_of((1, 2)), keys_of((1,)))


def test_an_answer_unlike_the_schema_is_an_error_not_a_hang() -> None:
    batcher = make_batcher(trigger_rows=1)
    host = Host(batcher)
    with linked(lambda: host.address) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        future = client.submit("explore", observation_of((2,)), keys_of((2,)))
        batch = batcher.next_batch(TIMEOUT_S)
        assert batch is not None
        wrong = ECHO | {"id": np.zeros(1, np.float64)}
        batch.requests[0].future.set_result(Answer(result=wrong, policy_version=0))
        with pytest.raises(RuntimeError, match="id is float64"):
            future.result(TIMEOUT_S)
    host.close()


@pytest.mark.parametrize("error", [Busy("full"), Expired("late"), BatcherClosedError("over")])
def test_errors_keep_their_type(error: Exception) -> None:
    batcher = make_batcher(trigger_rows=1)
    host = Host(batcher)
    with linked(lambda: host.address) as link:
        client = RemoteInferenceClient(link, "group_0")
        client.join()
        future = client.submit("explore", observation_of((2,)), keys_of((2,)))
        batch = batcher.next_batch(TIMEOUT_S)
        assert batch is not None
        batch.requests[0].future.set_exception(error)
        found = future.exception(TIMEOUT_S)
        assert type(found) is type(error) and str(found) == str(error)
    host.close()


@pytest.mark.fault(10)
@pytest.mark.parametrize("error", [ZeroDivisionError("no"), ValueError("shapes differ")])
def test_a_request_whose_server_fails_is_asked_again(error: Exception) -> None:
    """What the server fails of is no answer: the simulator would fail of it as well."""
    with RemoteRig() as rig:
        rig.publish(0)

        def fail() -> None:
            raise error

        rig.sampler.before.append(fail)
        with pytest.raises(ServerLostError):
            rig.ask(0, 1, 2).result(TIMEOUT_S)
        rig.join()
        assert rig.error is error


# -------------------------------------------------------------------------- a slow simulator


def test_a_simulator_that_does_not_read_holds_up_no_server() -> None:
    """Its answers fill the network's buffers; the server's thread goes on."""
    num_asks, size = 60, 1 << 20
    blob = np.zeros((1, size), np.uint8)
    schema = InferenceSchema(observation_of((1,)), {"explore": blob})
    batcher = make_batcher(trigger_rows=1, capacity_rows=1000)
    host = Host(batcher, schema=schema)
    deaf = dial(host)
    assert deaf.receive().kind == "welcome"
    say(deaf, "join", "deaf")
    arrays = schema.pack_query("explore", observation_of((1,)), keys_of((1,)))
    fields = {"session": "s1", "client": "deaf", "kind": "explore"}
    for number in range(num_asks):
        deaf.send(Frame(kind="ask", fields=fields | {"number": number}, arrays=arrays))

    def serve() -> int:
        served = 0
        while served < num_asks:
            batch = batcher.next_batch(TIMEOUT_S)
            assert batch is not None
            for request in batch.requests:
                request.future.set_result(Answer(result=blob, policy_version=0))
            served += len(batch.requests)
        return served

    assert in_thread(serve).result(TIMEOUT_S) == num_asks
    assert deaf.receive().kind == "answer"
    deaf.close()
    host.close()
