"""Accelerators of a machine that does not exist, shared out among processes."""

import io
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.config import ConfigError, RuntimeConfig
from jaxvla.runtime import launch
from jaxvla.runtime.devices import offered_devices, share_out
from jaxvla.runtime.launch import ProcessLauncher
from jaxvla.runtime.replica_spec import LEARNER, SERVER, SIMULATOR, ReplicaSpec

KINDS = (LEARNER, SERVER, SERVER, SIMULATOR, SIMULATOR)
CUDA, TPU = "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"


def asking(learner: str = "", server: str = "", simulator: str = "") -> RuntimeConfig:
    return RuntimeConfig(
        kind="processes",
        learner_resources=learner,
        server_resources=server,
        simulator_resources=simulator,
    )


def gpus(count: int) -> dict[str, tuple[str, ...]]:
    return {"GPU": tuple(str(index) for index in range(count)), "TPU": ()}


def chips(count: int) -> dict[str, tuple[str, ...]]:
    return {"GPU": (), "TPU": tuple(str(index) for index in range(count))}


def make_files(directory: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()
    return directory


def test_every_process_sees_its_own_gpus_alone():
    shares = share_out(asking("CPU=8,GPU=4", "GPU=1", "GPU=1"), KINDS, gpus(8))
    assert shares["learner_0"][CUDA] == "0,1,2,3"
    seen = [name for share in shares.values() for name in share[CUDA].split(",")]
    assert sorted(seen) == [str(index) for index in range(8)]
    assert all("JAX_PLATFORMS" not in share for share in shares.values())


def test_further_processes_of_the_learner_have_their_own_resources():
    settings = asking(learner="GPU=1", server="GPU=1")
    settings.follower_resources = "GPU=2"
    shares = share_out(settings, (LEARNER, LEARNER, SERVER), gpus(4))
    assert [len(share[CUDA].split(",")) for share in shares.values()] == [1, 2, 1]


def test_who_asks_for_none_runs_on_the_cpu_when_others_have_some():
    shares = share_out(asking(learner="GPU=1", server="GPU=1"), KINDS, gpus(3))
    for name in ("simulator_0", "simulator_1"):
        assert (shares[name][CUDA], shares[name]["JAX_PLATFORMS"]) == ("", "cpu")


def test_nothing_is_changed_when_nobody_asks():
    assert share_out(asking(learner="CPU=2"), KINDS, gpus(8)) == {
        name: {} for name in ("learner_0", "server_0", "server_1", "simulator_0", "simulator_1")
    }


@pytest.mark.parametrize(
    ("resources", "count", "field"),
    [
        (("GPU=4", "GPU=1", "GPU=1"), 7, "simulator_resources"),
        (("GPU=1", "", ""), 0, "learner_resources"),
        (("GPU=1.5", "", ""), 8, "learner_resources"),
        (("GPU=0.5", "GPU=0.6", ""), 2, "learner_resources"),
        (("TPU=1", "", ""), 8, "learner_resources"),
    ],
)
def test_too_few_are_refused(resources: tuple[str, str, str], count: int, field: str):
    with pytest.raises(ConfigError, match=rf"runtime\.{field} = .* Fix: --config\.runtime"):
        share_out(asking(*resources), KINDS, gpus(count))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from((0.25, 0.3, 0.5, 0.75, 1.0, 2.0)), min_size=3, max_size=3),
    st.integers(0, 8),
)
def test_no_gpu_is_given_twice(amounts: list[float], count: int):
    wanted = asking(*(f"GPU={amount:g}" for amount in amounts))
    try:
        shares = share_out(wanted, KINDS, gpus(count))
    except ConfigError:
        # First fit, the largest first, fills all but the last more than half.
        assert count < 2 * (amounts[0] + 2 * amounts[1] + 2 * amounts[2])
        return
    load = dict.fromkeys(map(str, range(count)), 0.0)
    by_kind = dict(zip((LEARNER, SERVER, SIMULATOR), amounts, strict=True))
    for name, share in shares.items():
        amount, names = by_kind[name.split("_")[0]], share[CUDA].split(",")
        assert len(set(names)) == len(names) == max(1, int(amount))
        for device in names:
            load[device] += min(amount, 1.0)
    assert max(load.values(), default=0.0) <= 1.0 + 1e-9


def test_processes_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    shares = share_out(asking("GPU=0.4", "GPU=0.15", "GPU=0.15"), KINDS, gpus(1))
    assert {share[CUDA] for share in shares.values()} == {"0"}
    fractions = [float(x["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for x in shares.values()]
    assert fractions == [0.36, 0.135, 0.135, 0.135, 0.135]


def test_chips_of_a_process_are_neighbours():
    shares = share_out(asking("TPU=1", "TPU=2", "TPU=1"), KINDS, chips(8))
    assert [shares[f"server_{i}"][TPU] for i in range(2)] == ["0,1", "2,3"]
    assert shares["server_0"]["TPU_CHIPS_PER_HOST_BOUNDS"] == "1,2,1"
    assert shares["learner_0"]["TPU_CHIPS_PER_HOST_BOUNDS"] == "1,1,1"
    singles = {shares[name][TPU] for name in ("learner_0", "simulator_0", "simulator_1")}
    assert singles == {"4", "5", "6"}
    with pytest.raises(ConfigError, match="1, 2, 4 or 8 TPU chips"):
        share_out(asking("TPU=3"), KINDS, chips(8))
    whole = share_out(asking("TPU=8"), (LEARNER,), chips(8))
    assert whole["learner_0"] == {TPU: "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("0", "1", "2")),
        ({CUDA: "5, 3"}, ("5", "3")),
        ({CUDA: ""}, ()),
        ({CUDA: "-1"}, ()),
        ({CUDA: "1,-1,2"}, ("1",)),
        ({CUDA: "GPU-8932f937,MIG-1"}, ("GPU-8932f937", "MIG-1")),
        ({CUDA: "5,3,7", "JAX_CUDA_VISIBLE_DEVICES": "2,0"}, ("7", "5")),
        ({"JAX_CUDA_VISIBLE_DEVICES": "all"}, ("0", "1", "2")),
    ],
)
def test_what_the_machine_offers(
    tmp_path: pathlib.Path, environ: dict[str, str], expected: tuple[str, ...]
):
    # A container that was given three GPUs of a machine: their numbers are not CUDA's.
    make_files(tmp_path, "nvidia0", "nvidia4", "nvidia7", "nvidiactl", "nvidia-uvm", "accel/accel0")
    assert offered_devices(environ, tmp_path) == {"GPU": expected, "TPU": ()}


def test_chips_by_their_files(tmp_path: pathlib.Path):
    assert offered_devices({}, tmp_path) == {"GPU": (), "TPU": ()}
    make_files(tmp_path, "vfio/vfio", "vfio/0", "vfio/1")
    assert offered_devices({}, tmp_path)["TPU"] == ("0", "1")
    assert offered_devices({TPU: "1"}, tmp_path)["TPU"] == ("1",)


def test_a_choice_of_jax_that_cuda_does_not_have_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match="JAX_CUDA_VISIBLE_DEVICES = '1'"):
        offered_devices({CUDA: "7", "JAX_CUDA_VISIBLE_DEVICES": "1"}, tmp_path)


def test_a_process_is_started_with_its_variables(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[dict[str, str]] = []

    class Ended:
        """A process that has come and gone."""

        pid = 2**22 + 1  # beyond the kernel's largest

        def __init__(self, command: list[str], *, env: dict[str, str], **_: object):
            assert command[0] == sys.executable
            self.stdin = io.BytesIO()
            started.append(env)

        def wait(self) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Ended)
    assert launch.subprocess is subprocess
    launcher = ProcessLauncher(tmp_path, {"server_1": {CUDA: "3"}})
    for index in range(2):
        spec = ReplicaSpec(
            kind=SERVER,
            index=index,
            launch=0,
            control=("127.0.0.1", 1),
            token="",
            host="",
            workdir="",
            command="",
            config={},
        )
        launcher.launch(spec, lambda _: None)
    launcher.close()
    assert started == [dict(os.environ), os.environ | {CUDA: "3"}]
