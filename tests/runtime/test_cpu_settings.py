"""Process settings of the entry point."""

import importlib.metadata
import importlib.util
import os

import pytest

from jaxvla.runtime import cpu_settings

FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=2"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing set, and this process's allocator left alone."""
    for name in ("XLA_FLAGS", "PJRT_NPROC", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "")  # so that the end of the test puts it back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "0")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    set_plugins(monkeypatch)


def set_plugins(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Lets it seem that these are JAX's plug-ins for accelerators."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: names)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_makes_and_reports_the_settings():
    lines = cpu_settings.apply()
    assert os.environ["XLA_FLAGS"] == FLAGS
    assert os.environ["PJRT_NPROC"] == "8"
    assert lines == [
        f"set XLA_FLAGS={FLAGS}",
        "set PJRT_NPROC=8",
    ]
    assert cpu_settings.apply() == []


def test_keeps_the_users_flags_beside_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    cpu_settings.apply()
    assert os.environ["XLA_FLAGS"] == f"{FLAGS} --xla_force_host_platform_device_count=4"


def test_a_word_that_is_no_flag_hides_none_of_ours(monkeypatch: pytest.MonkeyPatch):
    """XLA stops reading at it."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    monkeypatch.setenv("XLA_FLAGS", flags)
    cpu_settings.apply()
    assert os.environ["XLA_FLAGS"] == f"{FLAGS} {flags}"


def test_a_file_of_flags_is_left_to_the_user(monkeypatch: pytest.MonkeyPatch):
    """XLA takes the variable for a file's name unless it begins with a flag."""
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla_flags")
    assert cpu_settings.apply()[0] == f"XLA_FLAGS names a file, which should have {FLAGS}"
    assert os.environ["XLA_FLAGS"] == "/etc/xla_flags"


def test_leaves_what_the_user_has_set_alone(monkeypatch: pytest.MonkeyPatch):
    flags = "--xla_cpu_use_fusion_emitters=true --xla_backend_optimization_level=3"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert cpu_settings.apply() == []
    assert os.environ["XLA_FLAGS"] == flags
    assert os.environ["PJRT_NPROC"] == "3"


def test_the_code_for_an_accelerator_is_optimized_in_full(monkeypatch: pytest.MonkeyPatch):
    set_plugins(monkeypatch, "xla_cuda13")
    cpu_settings.apply()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=false"


def test_a_large_machine_needs_no_larger_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    cpu_settings.apply()
    assert "PJRT_NPROC" not in os.environ
