"""The supervisor against processes that are played by the test."""

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from jaxvla.config import RuntimeConfig
from jaxvla.runtime.directory import Directory
from jaxvla.runtime.replica_spec import ReplicaSpec
from jaxvla.runtime.screen_forwarding import ScreenForwarder, ScreenReceiver
from jaxvla.runtime.supervisor import Supervisor
from jaxvla.telemetry.progress import Screen
from jaxvla.transport.channel import ChannelConfig, Connection, ConnectionLostError, connect
from jaxvla.transport.frames import Frame

CHANNEL = ChannelConfig(token=b"0" * 32, silence_s=20.0, ping_s=1.0)
WAIT_S = 30.0


class Actor:
    """A process as the supervisor sees it, moved by the test."""

    def __init__(self, spec: ReplicaSpec, on_end: Callable[[str], None]):
        self.spec = spec
        self.was_killed = threading.Event()
        self._on_end = on_end
        self._has_ended = False
        self._connection: Connection | None = None

    def kill(self) -> None:
        self.was_killed.set()
        self.end("signal 9")

    def connect(self) -> "Actor":
        name = f"{self.spec.name}.{self.spec.launch}"
        self._connection = connect(self.spec.control, CHANNEL, name=name, timeout_s=WAIT_S)
        return self

    @property
    def connection(self) -> Connection:
        assert self._connection is not None, "connect first"
        return self._connection

    def say(self, kind: str, **fields: object) -> None:
        self.connection.send(Frame(kind=kind, fields=fields))

    def hear(self, kind: str) -> Frame:
        """The next frame of a kind; others are skipped."""
        while True:
            frame = self.connection.receive()
            if frame.kind == kind:
                return frame

    def directory(self, holds: Callable[[Directory], bool]) -> Directory:
        """The next directory of which something holds."""
        while True:
            directory = Directory.from_fields(self.hear("directory").fields)
            if holds(directory):
                return directory

    def end(self, how: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            if self._connection is not None:
                self._connection.close()
            self._on_end(how)


class Stage:
    """Implements Launcher; hands out what was launched."""

    def __init__(self) -> None:
        self.launched: queue.Queue[Actor] = queue.Queue()
        self.all: list[Actor] = []
        self.is_closed = False

    def launch(self, spec: ReplicaSpec, on_end: Callable[[str], None]) -> Actor:
        actor = Actor(spec, on_end)
        self.all.append(actor)
        self.launched.put(actor)
        return actor

    def close(self) -> None:
        self.is_closed = True
        for actor in self.all:
            actor.kill()

    def next(self, name: str) -> Actor:
        actor = self.launched.get(timeout=WAIT_S)
        assert actor.spec.name == name
        return actor.connect()


class Shown(io.StringIO):
    """What was shown so far, to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def write(self, text: str) -> int:
        with self._changed:
            self._changed.notify_all()
            return super().write(text)

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.getvalue(), WAIT_S), self.getvalue()


class Play:
    """A supervisor in a thread."""

    def __init__(self, num_learners: int = 1, **settings: float):
        values = {"restart_backoff_s": 0.01, "grace_s": 5.0, "max_restarts": 2} | settings
        self.stage, self.stop_requested = Stage(), threading.Event()
        self.out = Shown()
        self._codes: queue.Queue[int] = queue.Queue()
        self._screen = Screen(self.out, num_updates=3)
        self._supervisor = Supervisor(
            _spec,
            num_learners=num_learners,
            num_servers=2,
            num_simulators=2,
            launcher=self.stage,
            channel=CHANNEL,
            host="127.0.0.1",
            screen=ScreenReceiver(self._screen),
            stop_requested=self.stop_requested,
            settings=RuntimeConfig(**values),  # pyright: ignore[reportArgumentType]
        )
        threading.Thread(target=lambda: self._codes.put(self._supervisor.run())).start()
        learners = [f"learner_{index}" for index in range(num_learners)]
        names = (*learners, "server_0", "server_1", "simulator_0", "simulator_1")
        self.actors = {name: self.stage.next(name) for name in names}

    def __getitem__(self, name: str) -> Actor:
        return self.actors[name]

    def restarted(self, name: str) -> Actor:
        self.actors[name] = self.stage.next(name)
        return self.actors[name]

    def code(self) -> int:
        return self._codes.get(timeout=WAIT_S)

    def finish(self, code: int = 0) -> int:
        """The learner ends, then everybody who is told to stop."""
        self["learner_0"].say("ended", code=code, detail="")
        for actor in self.actors.values():
            with contextlib.suppress(ConnectionLostError):
                actor.hear("stop")
            actor.end("exit code 0")
        return self.code()


def _spec(kind: str, index: int, control: tuple[str, int], token: str) -> ReplicaSpec:
    return ReplicaSpec(
        kind=kind,
        index=index,
        launch=0,
        control=control,
        token=token,
        host="127.0.0.1",
        workdir="/nowhere",
        command="",
        config={},
    )


@pytest.fixture
def play() -> Iterator[Play]:
    made = Play()
    yield made
    made.stop_requested.set()


def _learner_listens(play: Play, session: str = "a1") -> None:
    """Policy servers say where they listen when they have found the learner."""
    play["learner_0"].say("listening", address=["127.0.0.1", 7], session=session)
    for name in ("server_0", "server_1"):
        play[name].directory(lambda d: d.session == session)


def test_everybody_learns_where_the_others_are(play: Play):
    _learner_listens(play)
    found = play["simulator_1"].directory(lambda d: d.session == "a1")
    assert found.learner == ("127.0.0.1", 7)
    play["server_1"].say("listening", address=["127.0.0.1", 8], session="a1")
    found = play["simulator_0"].directory(lambda d: 1 in d.servers)
    assert found.servers == {1: ("127.0.0.1", 8)}
    # A server that still serves an earlier learner is none of this one's.
    play["server_0"].say("listening", address=["127.0.0.1", 9], session="a0")
    play["server_0"].say("listening", address=["127.0.0.1", 10], session="a1")
    found = play["simulator_0"].directory(lambda d: 0 in d.servers)
    assert found.servers == {0: ("127.0.0.1", 10), 1: ("127.0.0.1", 8)}
    assert play.finish() == 0
    assert play.stage.is_closed


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_the_learners_word_is_the_runs(play: Play, code: int):
    assert play.finish(code) == code


def test_the_screen_shows_what_the_learner_says(play: Play):
    forwarder = ScreenForwarder(play["learner_0"].connection.send)
    forwarder.message("hello")
    with forwarder.phase("compile"):
        pass
    with pytest.raises(RuntimeError), forwarder.phase("warm"):
        raise RuntimeError
    rates = {"eval/success_rate": 0.5, "eval/ci95_low": 0.4, "eval/ci95_high": 0.6}
    forwarder.evaluated({**rates, "eval/episodes": 8}, update=1)
    forwarder.update({"update": 1, "time_s": 1.0, "learner/loss/total": float("nan")})
    assert play.finish() == 0
    shown = play.out.getvalue()
    for line in ("hello", "compile took", "warm failed after", "success 0.50", "update 1/3"):
        assert line in shown


def test_a_simulator_that_dies_is_started_again(play: Play):
    play["simulator_1"].end("signal 9")
    again = play.restarted("simulator_1")
    assert again.spec.launch == 1
    assert again.directory(lambda d: True).session == ""
    restarts = play["learner_0"].hear("restarts").fields["restarts"]
    assert restarts == {"simulation": 1}
    play.out.wait_for("simulator_1 ended (signal 9); restart in 0.01 s (1 of 2 in a row)")
    assert play.finish() == 0


@pytest.mark.fault(10)
def test_a_server_that_dies_leaves_the_directory(play: Play):
    _learner_listens(play)
    play["server_0"].say("listening", address=["127.0.0.1", 8], session="a1")
    play["simulator_0"].directory(lambda d: 0 in d.servers)
    play["server_0"].end("exit code 1")
    assert play["simulator_0"].directory(lambda d: not d.servers).session == "a1"
    play.restarted("server_0")
    assert play.finish() == 0


@pytest.mark.fault(12)
def test_a_learner_that_dies_goes_on_in_another_session(play: Play):
    _learner_listens(play)
    play["simulator_0"].directory(lambda d: d.session == "a1")
    play["learner_0"].end("signal 9")
    assert play["simulator_0"].directory(lambda d: d.session != "a1").learner is None
    play.restarted("learner_0")
    _learner_listens(play, session="b2")
    assert play["learner_0"].hear("restarts").fields["restarts"] == {"learning": 1}
    assert play["simulator_0"].directory(lambda d: d.learner is not None).session == "b2"
    assert play.finish() == 0


@pytest.mark.fault(31)
def test_a_process_that_falls_silent_is_killed_first(play: Play, caplog: pytest.LogCaptureFixture):
    play["server_1"].connection.close()
    assert play["server_1"].was_killed.wait(WAIT_S)
    assert "server_1: the connection to server_1.0 is lost" in caplog.text
    assert play.restarted("server_1").spec.launch == 1
    assert play.finish() == 0


def test_what_an_earlier_start_says_is_no_news(play: Play):
    _learner_listens(play)
    old = play["server_0"]
    old.end("signal 9")
    new = play.restarted("server_0")
    late = Actor(old.spec, lambda how: None).connect()
    with pytest.raises(ConnectionLostError):
        late.say("listening", address=["127.0.0.1", 1], session="a1")
        late.hear("nothing")
    new.say("listening", address=["127.0.0.1", 2], session="a1")
    assert new.directory(lambda d: bool(d.servers)).servers == {0: ("127.0.0.1", 2)}
    assert play.finish() == 0


def test_the_run_goes_on_with_fewer_simulators(play: Play):
    for launch in range(3):
        play["simulator_0"].end(f"exit code {launch}")
        if launch < 2:
            play.restarted("simulator_0")
    play.out.wait_for("simulator_0 ended (exit code 2) after 2 restarts in a row")
    play.out.wait_for("going on with 1 of its kind")
    _learner_listens(play)
    play["simulator_1"].directory(lambda d: d.session == "a1")
    assert play.finish() == 0


def test_servers_that_are_given_up_are_told(play: Play):
    for launch in range(3):
        play["server_1"].end(f"exit code {launch}")
        if launch < 2:
            play.restarted("server_1")
    assert play["simulator_0"].directory(lambda d: bool(d.given_up)).given_up == {1}
    assert play.finish() == 0


def test_the_run_ends_when_none_are_left():
    play = Play(max_restarts=0)
    play["simulator_0"].end("signal 11")
    play["simulator_1"].end("signal 11")
    assert play.code() == 1
    assert all(actor.was_killed.is_set() for actor in play.stage.all)


def test_wrong_settings_end_the_run_at_once(play: Play):
    play["server_0"].say("ended", code=2, detail="config.x = 1: must be 2")
    assert play.code() == 2
    assert "error: server_0: config.x = 1: must be 2" in play.out.getvalue()


def test_last_words_count_that_come_after_the_end(play: Play):
    learner = play["learner_0"]
    learner._on_end("exit code 0")
    learner._has_ended = True
    learner.say("ended", code=0, detail="")
    learner.connection.close()
    del play.actors["learner_0"]
    for actor in play.actors.values():
        actor.hear("stop")
        actor.end("exit code 0")
    assert play.code() == 0


def test_a_stop_is_the_learners_to_carry_out(play: Play):
    play.stop_requested.set()
    play["learner_0"].hear("stop")
    assert play.finish(3) == 3


@pytest.mark.fault(17)
def test_a_learner_that_does_not_stop_is_ended():
    play = Play(grace_s=0.3)
    play.stop_requested.set()
    play["learner_0"].hear("stop")
    assert play.code() == 3
    assert play["learner_0"].was_killed.is_set()


def test_a_stop_while_there_is_no_learner_ends_the_run():
    play = Play(restart_backoff_s=30.0)
    play["learner_0"].end("signal 9")
    play.stop_requested.set()
    assert play.code() == 3


def test_a_learner_killed_while_it_stops_counts_as_stopped(play: Play):
    play.stop_requested.set()
    play["learner_0"].hear("stop")
    play["learner_0"].end("signal 9")
    assert play.code() == 3


# ------------------------------------------------------------------------------- gangs


@pytest.fixture
def gang() -> Iterator[Play]:
    """A learner of three processes."""
    made = Play(num_learners=3)
    yield made
    made.stop_requested.set()


GANG = ("learner_0", "learner_1", "learner_2")


def _gathers(play: Play, port: int) -> None:
    """The leader listens for the others, which are told."""
    play["learner_0"].say("gathering", address=["127.0.0.1", port])
    for name in GANG[1:]:
        found = play[name].directory(lambda d: d.gang is not None)
        assert found.gang == ("127.0.0.1", port)


def _restarted_gang(play: Play) -> None:
    """All of it, in order, and nobody else."""
    before = [play[name] for name in GANG]
    for name in GANG:
        play.restarted(name)
    assert all(actor._has_ended for actor in before)


@pytest.mark.parametrize("name", GANG)
def test_a_gang_lives_and_dies_together(gang: Play, name: str):
    _gathers(gang, 7)
    _learner_listens(gang)
    gang[name].end("signal 9")
    _restarted_gang(gang)
    gang.out.wait_for(
        f"{name} ended (signal 9); restart of all 3 of its kind in 0.01 s (1 of 2 in a row)"
    )
    assert [gang[x].spec.launch for x in GANG] == [1, 1, 1]
    assert gang.stage.launched.empty()
    # Nothing of the last start is left for followers of this one to find.
    known = gang["learner_1"].directory(lambda d: True)
    assert (known.gang, known.learner, known.session) == (None, None, "")
    _gathers(gang, 8)
    _learner_listens(gang, session="b2")
    assert gang["learner_0"].hear("restarts").fields["restarts"] == {"learning": 1}
    assert not any(gang[x].was_killed.is_set() for x in ("server_0", "simulator_0"))
    assert gang.finish() == 0


def test_a_gang_has_one_budget(gang: Play):
    for name in ("learner_1", "learner_2"):
        gang[name].end("signal 9")
        _restarted_gang(gang)
    gang["learner_0"].end("signal 11")
    gang.out.wait_for("error: learner_0 ended (signal 11) after 2 restarts in a row")
    assert gang.code() == 1
    assert "going on with" not in gang.out.getvalue()


def test_a_failure_of_the_leader_of_a_gang_is_tried_again(gang: Play):
    gang["learner_0"].say("ended", code=1, detail="a collective failed")
    gang["learner_0"].end("exit code 1")
    _restarted_gang(gang)
    gang.out.wait_for("learner_0 ended (exit code 1: a collective failed); restart of all 3")
    # What it said then is not said of the next end.
    gang["learner_0"].end("signal 9")
    _restarted_gang(gang)
    gang.out.wait_for("learner_0 ended (signal 9); restart of all 3")
    assert gang.finish() == 0


@pytest.mark.parametrize("code", [0, 3, 4])
def test_other_words_of_the_leader_are_the_runs(gang: Play, code: int):
    assert gang.finish(code) == code


@pytest.mark.parametrize("code", [0, 1, 4])
def test_a_followers_word_is_not_the_runs(gang: Play, code: int):
    gang["learner_2"].say("ended", code=code, detail="why")
    gang["learner_2"].end(f"exit code {code}")
    _restarted_gang(gang)
    gang.out.wait_for(f"learner_2 ended (exit code {code}: why); restart of all 3")
    assert gang.finish() == 0


def test_wrong_settings_of_a_follower_end_the_run(gang: Play):
    gang["learner_1"].say("ended", code=2, detail="config.x = 1: must be 2")
    assert gang.code() == 2


def test_what_a_process_says_that_was_killed_with_its_gang_is_no_news():
    play = Play(num_learners=2)
    leader, kill = play["learner_0"], play["learner_0"].kill
    leader.kill = leader.was_killed.set  # it takes a while to be gone
    play["learner_1"].end("signal 9")
    assert leader.was_killed.wait(WAIT_S)
    leader.say("gathering", address=["127.0.0.1", 7])
    leader.say("listening", address=["127.0.0.1", 7], session="a1")
    kill()
    play.restarted("learner_0")
    play.restarted("learner_1")
    told = [play["simulator_0"].hear("directory").fields for _ in range(3)]
    assert all(not (x["gang"] or x["learner"] or x["session"]) for x in told)
    assert play.finish() == 0


def test_a_gang_that_is_broken_while_it_stops_counts_as_stopped(gang: Play):
    gang.stop_requested.set()
    gang["learner_0"].hear("stop")
    gang["learner_1"].end("signal 9")
    assert gang.code() == 3
