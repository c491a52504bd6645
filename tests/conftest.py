"""Settings of the test process, made before JAX starts a backend.

A setting that is already in the environment is left alone, so any test can be run
otherwise, e.g. `JAX_PLATFORMS=cuda pytest tests/models`. Subprocesses inherit them.
"""

import os
import pathlib

_XLA_FLAGS = {
    # MJX: a step of a MuJoCo scene takes seconds with the fusion emitters (jaxlib 0.10.2).
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_force_host_platform_device_count": "8",
    # As in runtime/cpu_settings.py: compiles almost twice as fast.
    "--xla_backend_optimization_level": "2",
}
_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    # Batched MuJoCo steps can deadlock in a thread pool of two.
    "PJRT_NPROC": "8",
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path("~/.cache/jaxvla/xla").expanduser()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def _complete_environment() -> None:
    """Adds what is missing. JAX reads most of it when it is imported, hence at import time."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"{flag}={value}" for flag, value in _XLA_FLAGS.items() if flag not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


_complete_environment()

import gc  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from fault_rows import FaultReport, fault_row, mark_faults  # noqa: E402

__all__ = ["fault_row"]

_MAX_MAPPINGS = 20_000
_MAPPINGS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory_mappings() -> Iterator[None]:
    """Drops compiled functions when there are too many for one process.

    XLA's CPU backend maps memory three times for every kernel it compiles. Linux allows a process
    65,530 mappings (vm.max_map_count); at the next one XLA dies of a segmentation fault.
    """
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault_report", help="JSON file: how the tests of faults ended")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault_report")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist reports in its first process
        config.pluginmanager.register(FaultReport(pathlib.Path(path)))


@pytest.hookimpl(tryfirst=True)  # before -m selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_faults(items)
