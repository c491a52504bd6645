"""A simulator whose requests are turned away now and then."""

from concurrent.futures import Future

import numpy as np
import pytest
from scripted_group import ScriptedGroup
from simulator_run import CALM, FakeClient, FakeQueue, T, make

from jaxvla.serving.batcher import Busy, Expired
from jaxvla.types import Observation


class BusyClient(FakeClient):
    """Turns every second request away."""

    def __init__(self, name: str, refusal: Exception):
        super().__init__(name)
        self._refusal = refusal
        self.num_refused = 0
        self._refuses = False

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        self._refuses = not self._refuses
        if not self._refuses:
            return super().submit(kind, observation, keys)
        self.num_refused += 1
        if isinstance(self._refusal, Busy):
            raise self._refusal
        future: Future = Future()
        future.set_exception(self._refusal)
        return future


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("refusal", [Busy("4 rows wait"), Expired("waited 5 s")])
def test_it_asks_again_and_makes_the_same_trajectory(refusal: Exception, overlap: bool) -> None:
    made, queues = [], []
    for clients in (None, [BusyClient("a", refusal)]):
        queues.append(FakeQueue(1))
        groups = [ScriptedGroup("a", CALM)]
        made.append(make(groups, queues[-1], clients=clients, overlap=overlap))
        made[-1].run()
    calm, busy = (x.clients[0] for x in made)
    assert isinstance(busy, BusyClient) and busy.num_refused == T + 1
    for expected, got in zip(calm.queries, busy.queries, strict=True):
        assert expected[0] == got[0]
        np.testing.assert_array_equal(expected[1], got[1])
        np.testing.assert_array_equal(expected[2], got[2])  # the random keys travel along
    assert [len(queue.items) for queue in queues] == [1, 1]
    assert not queues[1].failed
