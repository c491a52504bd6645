"""What is found to be left of processes that leave something behind."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import uuid

import pytest
from run_watch import SUPERVISOR, RunWatch

CHILD = textwrap.dedent("""
    import socket, sys
    server = socket.create_server(("127.0.0.1", 0))
    print("ready", flush=True)
    sys.stdin.read()
""")
PARENT = textwrap.dedent("""
    import pathlib, subprocess, sys
    temporary, shared, leaves, code = sys.argv[1:]
    process_id = 0
    if leaves == "yes":
        command = [sys.executable, "-c", code]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        pathlib.Path(temporary, "left").touch()
        pathlib.Path(shared).write_bytes(bytes(10))
        process_id = child.pid
    print(process_id, flush=True)
    sys.stdin.readline()
""")


@pytest.fixture
def shared_memory():
    path = pathlib.Path("/dev/shm") / f"watch_{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def start(
    tmp_path: pathlib.Path, shared: pathlib.Path, leaves: str
) -> tuple[subprocess.Popen[str], RunWatch, int]:
    """A process that has done what it does; its watch; and its child."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(temporary), str(shared), leaves, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    watch = RunWatch(process.pid, tmp_path / "run", temporary, interval_s=3600.0)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    watch.look()
    return process, watch, child


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_nothing_is_left_of_a_tidy_process(tmp_path: pathlib.Path, shared_memory: pathlib.Path):
    process, watch, _ = start(tmp_path, shared_memory, "no")
    assert watch.num_files() >= 3 and watch.pss_mib() > 1.0
    assert [x.name for x in watch.memory()] == [SUPERVISOR]
    end(process)
    watch.close()
    left = watch.leftovers(wait_s=30.0)
    assert str(shared_memory) not in left.shared_memory
    assert (left.processes, left.listening, left.temporary) == ([], [], [])


def test_logs_of_ray_are_not_ours(tmp_path: pathlib.Path):
    temporary = tmp_path / "tmp"
    (temporary / "ray" / "session").mkdir(parents=True)
    for name in ("ray/session/raylet.out", "ours"):
        (temporary / name).touch()
    watch = RunWatch(os.getpid(), tmp_path / "run", temporary, interval_s=3600.0)
    watch.close()
    assert watch.leftovers(wait_s=0.0).temporary == [str(temporary / "ours")]


def test_everything_that_is_left_is_found(tmp_path: pathlib.Path, shared_memory: pathlib.Path):
    process, watch, child = start(tmp_path, shared_memory, "yes")
    try:
        process.kill()
        process.wait()
        watch.close()
        left = watch.leftovers(wait_s=0.1)
        assert [x.endswith(f"({child})") for x in left.processes] == [True]
        assert [x.endswith(f"({child})") for x in left.listening] == [True]
        assert str(shared_memory) in left.shared_memory
        assert left.temporary == [str(tmp_path / "tmp" / "left")]
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_programs_are_known_by_the_name_of_their_latest_start(tmp_path: pathlib.Path):
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    lines = ("learner_0 is process 5", "server_1 is process 6", "learner_0 is process 7")
    (logs / "runtime.log").write_text("".join(f"12:00 INFO [runtime] {x}\n" for x in lines))
    watch = RunWatch(os.getpid(), tmp_path / "run", tmp_path, interval_s=3600.0)
    assert watch.processes() == {"learner_0": 7, "server_1": 6}
    assert watch.restarted() == ["learner_0"]
    watch.close()
