"""The serve job in one process: a real checkpoint, policy server, batcher and client."""

import contextlib
import dataclasses
import io
import itertools
import pathlib
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving.tiny_policy import TinyPolicy
from simulation.counter_env import CounterEnv
from tiny_run import TIMEOUT_S, make_blueprint, quick_jit

from jaxvla import rng
from jaxvla.config import ConfigError, UsageError, WebsocketConfig
from jaxvla.models.prompts import tokenize_prompt
from jaxvla.runtime import serve
from jaxvla.runtime.build import Blueprint
from jaxvla.runtime.serve import check_endpoint, serve_policy
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.requests import RequestKeys, RequestReader
from jaxvla.serving.sampling import Sampler
from jaxvla.simulation.unroll import TokenTable
from jaxvla.telemetry.progress import Screen
from jaxvla.types import Observation, Params

_INSTALL = "scripts/environment.sh installs it with the openpi extra"
openpi: Any = pytest.importorskip("openpi_client.websocket_client_policy", reason=_INSTALL)
exceptions: Any = pytest.importorskip("websockets.exceptions", reason=_INSTALL)

pytestmark = pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")
fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

UPDATE = 3
NUM_TOKENS = 24


class TwoCameraEnv(CounterEnv):
    """As large as an openpi request needs it to be."""

    spec = dataclasses.replace(
        CounterEnv.spec,
        cameras=("front", "wrist"),
        image_size=8,
        state_dim=3,
        state_low=(0.0,) * 3,
        state_high=(1.0,) * 3,
    )


def blueprint_of(**websocket: Any) -> Blueprint:
    settings = WebsocketConfig(**({"port": 0, "buckets": (1, 4)} | websocket))
    tokens: Any = np.zeros((2, NUM_TOKENS), np.int32)
    return dataclasses.replace(
        make_blueprint(TinyPolicy(TwoCameraEnv.spec), websocket=settings),
        env=TwoCameraEnv(),
        table=TokenTable(tokens=tokens, mask=tokens > 0),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Params]:
    """A work directory with a checkpoint, and the parameters in it."""
    workdir, blueprint = tmp_path_factory.mktemp("run"), blueprint_of()
    params = blueprint.policy.init(rng.root_key(5))
    checkpointer = blueprint.checkpointer(workdir)
    checkpointer.save(UPDATE, {"state": {"params": params}}, {"segments": {}})
    checkpointer.close()
    return workdir, params


class Job:
    """The job in a thread."""

    def __init__(self, blueprint: Blueprint, workdir: pathlib.Path):
        self.stop = threading.Event()
        self._said: SimpleQueue[str] = SimpleQueue()
        self.lines: list[str] = []
        screen = Screen(io.StringIO(), num_updates=1)
        screen.message = self._said.put
        self._code: Future[int] = Future()

        def run() -> None:
            try:
                self._code.set_result(serve_policy(blueprint, workdir, screen, self.stop))
            except BaseException as error:
                self._code.set_exception(error)
                self._said.put(f"ready ws://failed:0 {error}")

        threading.Thread(target=run, daemon=True).start()

    def until(self, pattern: str) -> re.Match[str]:
        while True:
            self.lines.append(self._said.get(timeout=TIMEOUT_S))
            if match := re.search(pattern, self.lines[-1]):
                return match

    def policy(self, port: int) -> Any:
        return openpi.WebsocketClientPolicy("127.0.0.1", port)

    def finish(self) -> int:
        self.stop.set()
        code = self._code.result(TIMEOUT_S)
        while not self._said.empty():
            self.lines.append(self._said.get())
        return code


@contextlib.contextmanager
def job_of(workdir: pathlib.Path, **websocket: Any) -> Iterator[tuple[Job, int]]:
    """A job that is ready, and its port."""
    job = Job(blueprint_of(**websocket), workdir)
    try:
        yield job, int(job.until(r"^ready +ws://[\w.]+:(\d+)")[1])
    finally:
        job.finish()


def request_of(number: int) -> dict[str, Any]:
    image = np.full((6, 10, 3), 40 * number, np.uint8)
    return {
        "observation/image": image,
        "observation/wrist_image": image[::-1] // 2,
        "observation/state": np.array([0.1 * number, 0.2, 0.3]),
        "prompt": f"count to {number}",
    }


def expected_actions(params: Params, number: int, keys: np.ndarray) -> np.ndarray:
    """Of the policy alone, one request by itself."""
    blueprint = blueprint_of()

    def tokenize(text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        del state
        return tokenize_prompt(blueprint.tokenizer, text, NUM_TOKENS)

    observation: Observation = RequestReader(blueprint.spec, tokenize).read(request_of(number))
    observation = jax.tree.map(jnp.asarray, observation)
    sample = blueprint.policy.act(params, observation, jax.random.wrap_key_data(keys), False)
    return np.asarray(sample.actions[0])


def is_same(actions: np.ndarray, expected: np.ndarray) -> bool:
    """To float32's rounding of numbers about 30 (means of token ids). Other noise makes 0.3."""
    return np.allclose(actions, expected, rtol=0, atol=1e-4)


def test_the_real_client_gets_the_policys_actions(saved: tuple[pathlib.Path, Params]) -> None:
    workdir, params = saved
    before = sorted(workdir.rglob("*"))
    with job_of(workdir) as (job, port):
        policy = job.policy(port)
        assert policy.get_server_metadata() == {
            "model": "tiny",
            "env": "counter",
            "update": UPDATE,
            "action_horizon": 2,
            "action_dim": 2,
            "state_dim": 3,
            "image_size": 8,
            "cameras": ["front", "wrist"],
        }
        keys = RequestKeys(rng.root_key(0))
        for number in (1, 2, 1):
            answer = policy.infer(request_of(number))
            expected = expected_actions(params, number, keys.take())
            assert answer["actions"].dtype == np.float32
            assert is_same(answer["actions"], expected)
            assert answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
        assert job.finish() == 0
    assert "model tiny of update 3, env counter, batches of 1, 4" in "\n".join(job.lines)
    assert re.search(r"^[\d.]+ requests/s \| latency p50 [\d.]+ ms p99 .* errors 0$", job.lines[-2])
    assert job.lines[-1].startswith("served 3 requests, 0 of them with errors, in ")
    assert sorted(workdir.rglob("*")) == before  # nothing is written


class Spy:
    """Holds the first forward until it is released and so many requests wait behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_behind: int):
        self.batches: list[int] = []
        """Rows of every forward."""
        self.is_running = threading.Event()
        self.release = threading.Event()
        submitted = threading.Semaphore(0)
        spy = self

        class SpySampler(Sampler):
            def run(self, kind: str, params: Any, observations: Any, keys: np.ndarray) -> Any:
                spy.batches.append(len(keys))
                assert kind == "act"
                if len(spy.batches) == 1:
                    spy.is_running.set()
                    assert spy.release.wait(TIMEOUT_S)
                    for _ in range(1 + num_behind):
                        assert submitted.acquire(timeout=TIMEOUT_S)
                return super().run(kind, params, observations, keys)

        class CountingBatcher(Batcher):
            def submit(self, **query: Any) -> Future:
                future = super().submit(**query)
                submitted.release()
                return future

        monkeypatch.setattr(serve, "Sampler", SpySampler)
        monkeypatch.setattr(serve, "Batcher", CountingBatcher)


def test_clients_share_a_forward_and_get_what_they_would_get_alone(
    saved: tuple[pathlib.Path, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, params = saved
    spy = Spy(monkeypatch, num_behind=3)
    spy.release.set()
    numbers = (1, 2, 3, 4)
    with job_of(workdir) as (job, port), ThreadPoolExecutor(4) as pool:
        silent = job.policy(port)  # connected, and asks nothing
        policies = [job.policy(port) for _ in numbers]
        first = pool.submit(policies[0].infer, request_of(1))
        assert spy.is_running.wait(TIMEOUT_S)
        others = [
            pool.submit(policy.infer, request_of(number))
            for policy, number in zip(policies[1:], numbers[1:], strict=True)
        ]
        found = [future.result(TIMEOUT_S)["actions"] for future in (first, *others)]
        assert spy.batches == [1, 3]
        assert silent.infer(request_of(1))["actions"].shape == (2, 2)
    keys = RequestKeys(rng.root_key(0))
    noise = [keys.take() for _ in numbers]
    # Which of the three came first is not ours to say: one order explains all of them.
    table = np.array([[expected_actions(params, n, key) for key in noise] for n in numbers])
    orders = [
        order
        for order in itertools.permutations(range(4))
        if all(is_same(found[i], table[i, k]) for i, k in enumerate(order))
    ]
    assert len(orders) == 1 and orders[0][0] == 0


def test_bad_requests_are_told_and_the_server_lives_on(saved: tuple[pathlib.Path, Params]) -> None:
    workdir, _ = saved
    bad = {
        "has no 'observation/state'": {"observation/state": ...},
        r"'observation/state' has shape \(8,\): send \[3\]": {"observation/state": np.zeros(8)},
        "'prompt': .* the limit max_tokens is 24": {"prompt": "x" * 99},
    }
    with job_of(workdir) as (job, port):
        for message, changes in bad.items():
            request = {k: v for k, v in (request_of(1) | changes).items() if v is not ...}
            with pytest.raises(RuntimeError, match=message) as raised:
                job.policy(port).infer(request)
            text = str(raised.value).partition("\n")[2]
            assert "\n" not in text and "Traceback" not in text and ".py" not in text
        assert job.policy(port).infer(request_of(1))["actions"].shape == (2, 2)
        assert job.finish() == 0
    assert job.lines[-1].startswith("served 4 requests, 3 of them with errors")


def test_a_stop_answers_the_request_on_its_way(
    saved: tuple[pathlib.Path, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, _ = saved
    spy = Spy(monkeypatch, num_behind=0)
    with job_of(workdir) as (job, port), ThreadPoolExecutor(1) as pool:
        idle, busy = job.policy(port), job.policy(port)
        answer = pool.submit(busy.infer, request_of(1))
        assert spy.is_running.wait(TIMEOUT_S)
        job.stop.set()
        with pytest.raises(exceptions.ConnectionClosed):
            idle._ws.recv(TIMEOUT_S)  # the stop is under way
        assert not answer.done()
        spy.release.set()
        assert answer.result(TIMEOUT_S)["actions"].shape == (2, 2)
        assert job.finish() == 0


def test_a_policy_server_that_fails_ends_the_job(
    saved: tuple[pathlib.Path, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenSampler(Sampler):
        def run(self, *arguments: Any) -> Any:
            raise MemoryError("no memory left at 0x1234")

    monkeypatch.setattr(serve, "Sampler", BrokenSampler)
    workdir, _ = saved
    with job_of(workdir) as (job, port):
        with pytest.raises(RuntimeError, match="internal error") as raised:
            job.policy(port).infer(request_of(1))
        assert "0x1234" not in str(raised.value)
        job.until("^stopping")
        assert job.finish() == 1
    assert job.lines[-1] == "serving failed: MemoryError: no memory left at 0x1234"


def test_a_work_directory_without_a_checkpoint(tmp_path: pathlib.Path) -> None:
    job = Job(blueprint_of(), tmp_path)
    job.until("holds no complete checkpoint")
    assert job.finish() == 1


# ------------------------------------------------------------------- before it begins


def test_an_address_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = blueprint_of(port=other.getsockname()[1]).config
        with pytest.raises(ConfigError, match=r"websocket.port = .*cannot listen on 127.0.0.1"):
            check_endpoint(config)


def test_an_address_of_another_machine_is_refused() -> None:
    config = blueprint_of(host="192.0.2.1", token_variable="JAXVLA_TEST_TOKEN").config
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXVLA_TEST_TOKEN", "s3cret")
        with pytest.raises(ConfigError, match=r"websocket.host = '192.0.2.1': cannot listen"):
            check_endpoint(config)
        patch.delenv("JAXVLA_TEST_TOKEN")
        with pytest.raises(ConfigError, match="Fix: export JAXVLA_TEST_TOKEN=TOKEN"):
            check_endpoint(config)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.asyncio.server", None)
    with pytest.raises(UsageError, match=r"pip install 'jaxvla\[openpi\]'"):
        check_endpoint(blueprint_of().config)


def test_an_env_that_openpis_requests_do_not_fit(tmp_path: pathlib.Path) -> None:
    blueprint = blueprint_of()
    env = TwoCameraEnv()
    env.spec = dataclasses.replace(env.spec, cameras=("a", "b", "c", "d"))
    with pytest.raises(UsageError, match="reads 4 cameras"):
        serve_policy(
            dataclasses.replace(blueprint, env=env),
            tmp_path,
            Screen(io.StringIO(), num_updates=1),
            threading.Event(),
        )
