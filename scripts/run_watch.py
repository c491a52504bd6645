"""The processes of a run as the operating system sees them: who they are, what they hold, and what
is left of them afterwards. Linux. For the scripts that measure whole runs."""

import collections
import contextlib
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

SUPERVISOR = "supervisor"
"""Name of the process that was started with the command."""
MIB = 2**20
_LISTENING = "0A"
"""State of a socket in /proc/net/tcp, see proc(5)."""
_RAY_DIRECTORY = "ray"
"""Among temporary files."""
_SHARED_MEMORY = pathlib.Path("/dev/shm")
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, FileNotFoundError)
_PROCESS_LINE = re.compile(r"(\w+_\d+) is process (\d+)")


@dataclass(kw_only=True)
class Memory:
    """Of one process, over time."""

    name: str
    """Such as "learner_0", or the command's name."""
    times_s: list[float] = field(default_factory=list)
    """Monotonic."""
    rss_mib: list[float] = field(default_factory=list)

    @property
    def span_s(self) -> float:
        """From the first sample to the last."""
        return self.times_s[-1] - self.times_s[0] if self.times_s else 0.0

    def slope_mib_per_min(self, skipped: float) -> float:
        """Median slope between pairs of samples (Theil and Sen), which steps and peaks do not move.

        Args:
          skipped: share of the samples at the beginning that is left out, in [0, 1).
        """
        first = int(skipped * len(self.times_s))
        every = max(1, (len(self.times_s) - first) // 200)
        times_s, values = self.times_s[first::every], self.rss_mib[first::every]
        slopes = sorted(
            60 * (values[j] - values[i]) / (times_s[j] - times_s[i])
            for j in range(len(values))
            for i in range(j)
            if times_s[j] > times_s[i]
        )
        return slopes[len(slopes) // 2] if slopes else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftovers:
    """What a run left behind, in words."""

    processes: list[str]
    listening: list[str]
    shared_memory: list[str]
    temporary: list[str]


class RunWatch:
    """Looks at a run every `interval_s`, from a thread, until it is closed."""

    def __init__(
        self,
        process_id: int,
        workdir: pathlib.Path,
        temporary: pathlib.Path,
        *,
        interval_s: float = 2.0,
    ):
        """Args:
        process_id: of the command.
        workdir: of the run.
        temporary: an empty directory that the run has for its temporary files.
        interval_s: between two looks.
        """
        self._root = psutil.Process(process_id)
        self._log = workdir / "logs" / "runtime.log"
        self._temporary = temporary
        self._interval_s = interval_s
        self._shared_before = _shared_memory()
        self._lock = threading.Lock()
        self._seen: dict[psutil.Process, Memory] = {}
        self._sockets: dict[str, str] = {}
        """Inode of each listening socket -> who had it."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the looking."""
        self._is_over.set()
        self._thread.join()

    def processes(self) -> dict[str, int]:
        """Name -> process id of the latest start of every program."""
        if not self._log.is_file():
            return {}
        return {name: int(pid) for name, pid in _PROCESS_LINE.findall(self._log.read_text())}

    def restarted(self) -> list[str]:
        """The program of every start that was not its first."""
        lines = _PROCESS_LINE.findall(self._log.read_text())
        starts = collections.Counter(name for name, _ in lines)
        return sorted((starts - collections.Counter(list(starts))).elements())

    def memory(self) -> list[Memory]:
        """Of every process so far."""
        with self._lock:
            return [
                Memory(name=x.name, times_s=list(x.times_s), rss_mib=list(x.rss_mib))
                for x in self._seen.values()
            ]

    def num_files(self) -> int:
        """Open files of the supervisor, sockets and pipes included."""
        return self._root.num_fds()

    def pss_mib(self) -> float:
        """Memory of all processes together: what several of them share counts once."""
        total = 0
        for process in self._alive():
            with contextlib.suppress(*_GONE):
                total += process.memory_full_info().pss
        return total / MIB

    def leftovers(self, *, wait_s: float) -> Leftovers:
        """What there is after the run. Waits for processes to be gone for `wait_s` at most.

        A segment of shared memory counts that is new and that no living process uses: others may
        run on this machine. What Ray keeps of its sessions, logs for the most part, is Ray's.
        """
        with self._lock:
            seen = dict(self._seen)
        _, alive = psutil.wait_procs(list(seen), timeout=wait_s)
        now = set(_listening_inodes())
        new = _shared_memory() - self._shared_before
        used = _used_shared_memory() if new else set[str]()
        return Leftovers(
            processes=[f"{seen[x].name} ({x.pid})" for x in alive],
            listening=[who for inode, who in self._sockets.items() if inode in now],
            shared_memory=sorted(new - used),
            temporary=sorted(
                str(x)
                for x in self._temporary.rglob("*")
                if not x.is_dir() and x.relative_to(self._temporary).parts[0] != _RAY_DIRECTORY
            ),
        )

    def _run(self) -> None:
        while not self._is_over.wait(self._interval_s):
            with contextlib.suppress(*_GONE):
                self.look()

    def look(self) -> None:
        """Takes one sample of everything."""
        names = {pid: name for name, pid in self.processes().items()}
        listening, now_s = set(_listening_inodes()), time.monotonic()
        for process in self._alive():
            with contextlib.suppress(*_GONE):
                name = names.get(process.pid, process.name())
                name = SUPERVISOR if process == self._root else name
                with self._lock:
                    memory = self._seen.setdefault(process, Memory(name=name))
                    memory.name = name
                    memory.times_s.append(now_s)
                    memory.rss_mib.append(process.memory_info().rss / MIB)
                    for inode in listening.intersection(_socket_inodes(process.pid)):
                        self._sockets[inode] = f"{name} ({process.pid})"

    def _alive(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _listening_inodes() -> Iterator[str]:
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(path).read_text().splitlines()[1:]:
                parts = line.split()
                if parts[3] == _LISTENING:
                    yield parts[9]


def _socket_inodes(process_id: int) -> Iterator[str]:
    for entry in os.scandir(f"/proc/{process_id}/fd"):
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry.path))
            if match:
                yield match[1]


def _shared_memory() -> set[str]:
    return {str(x) for x in _SHARED_MEMORY.rglob("*") if not x.is_dir()}


def _used_shared_memory() -> set[str]:
    """Mapped or opened by a process that is alive."""
    used: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE, OSError):
            maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
            used |= set(re.findall(r"/dev/shm/\S+", maps))
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    used.add(os.readlink(entry.path))
    return used
