"""Checkpoints: round trip, damage, interruption, mismatch."""

import contextlib
import logging
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Hashable, Iterator
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from fault_rows import FaultRow
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxvla.checkpoint import (
    Checkpointer,
    CheckpointMismatchError,
    CorruptCheckpointError,
    SaveError,
)
from jaxvla.config import UsageError

# A read that fails makes orbax close its event loop while other reads are still under way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass(kw_only=True)
class _State:
    params: Any
    moments: Any
    count: jax.Array
    absent: Any = None


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """4 x 2 devices."""
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _tree(factor: float, mesh: Mesh) -> dict[str, Any]:
    """Sharded, replicated and host leaves of several dtypes; struct, None and masked nodes."""
    split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {
        "kernel": jax.device_put(jnp.arange(32.0).reshape(8, 4) * factor, split),
        "bias": jax.device_put(jnp.full((3,), factor, jnp.bfloat16), whole),
        "frozen": jax.device_put(jnp.ones((2, 2)), whole),
    }
    labels = {"kernel": "trained", "bias": "trained", "frozen": "frozen"}
    groups: dict[Hashable, optax.GradientTransformation] = {
        "trained": optax.adamw(1e-3),
        "frozen": optax.set_to_zero(),
    }
    state = _State(
        params=params,
        moments=(optax.multi_transform(groups, labels).init(params), None),
        count=jnp.int32(factor),
    )
    rng = np.random.default_rng(int(factor))
    envs = {
        "images": rng.integers(0, 256, (2, 3, 3), np.uint8),
        "is_open": rng.random(5) < 0.5,
        "qpos": rng.normal(size=7),
        "scalar": np.asarray(factor, ml_dtypes.bfloat16),
        "missing": None,
    }
    return {"state": state, "groups": {"group_0": envs}}


def _target(tree: Any) -> Any:
    """Shapes, dtypes and placement of a tree."""

    def struct(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(struct, tree)


def _small(factor: float) -> dict[str, np.ndarray]:
    return {"w": np.arange(2048.0) * factor, "n": np.asarray(int(factor))}


def _small_target(record: dict[str, Any]) -> dict[str, np.ndarray]:
    return _small(0.0)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where checkpoints go; not made yet."""
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def two_steps(directory: pathlib.Path) -> pathlib.Path:
    """A directory with steps 3 and 5."""
    checkpointer = Checkpointer(directory, keep=2)
    for step in (3, 5):
        checkpointer.save(step, _small(step), {"step": step})
    checkpointer.close()
    return directory


def test_round_trip_keeps_structure_values_dtypes_and_placement(
    directory: pathlib.Path, mesh: Mesh
):
    tree = _tree(2.0, mesh)
    record = {"version": 4, "nested": {"rate": 0.1, "list": [1, None, "x"]}, "7": float("inf")}
    Checkpointer(directory, keep=2).save(4, tree, record)

    seen = []
    restored = Checkpointer(directory, keep=2).restore(lambda x: seen.append(x) or _target(tree))

    assert restored is not None and restored.step == 4
    assert restored.record == record
    assert seen == [record]
    chex.assert_trees_all_equal_structs(restored.arrays, tree)
    chex.assert_trees_all_equal(restored.arrays, tree)
    for found, saved in zip(jax.tree.leaves(restored.arrays), jax.tree.leaves(tree), strict=True):
        assert type(found) is type(saved) and found.dtype == saved.dtype
        if isinstance(saved, jax.Array):
            assert found.sharding.is_equivalent_to(saved.sharding, saved.ndim)


def test_restores_into_another_placement(directory: pathlib.Path, mesh: Mesh):
    tree = {"w": _tree(3.0, mesh)["state"].params["kernel"]}
    Checkpointer(directory, keep=2).save(1, tree, {})
    one_device = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    wanted = NamedSharding(one_device, PartitionSpec())

    restored = Checkpointer(directory, keep=2).restore(
        lambda _: {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=wanted)}
    )

    assert restored is not None
    assert restored.arrays["w"].sharding.is_equivalent_to(wanted, 2)
    np.testing.assert_array_equal(restored.arrays["w"], tree["w"])


def test_saving_keeps_no_host_copies(directory: pathlib.Path, mesh: Mesh):
    """Else a checkpoint of a large state would hold it a second time until the next update."""
    split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    tree = {"w": jax.device_put(jnp.ones((512, 1024)), split)}
    checkpointer = Checkpointer(directory, keep=2)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        checkpointer.save(1, tree, {})
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < tree["w"].nbytes / 2


def test_an_empty_place_holds_nothing_and_stays_untouched(directory: pathlib.Path):
    checkpointer = Checkpointer(directory, keep=2)
    assert checkpointer.steps() == []
    assert checkpointer.restore(_small_target) is None
    checkpointer.check(_small_target)
    checkpointer.close()
    assert not directory.parent.exists()


def test_keeps_the_newest_steps(directory: pathlib.Path):
    checkpointer = Checkpointer(directory, keep=2)
    for step in (0, 2, 4, 9):
        checkpointer.save(step, _small(step), {})
    assert checkpointer.steps() == [4, 9]
    assert sorted(path.name for path in directory.iterdir()) == ["4", "9"]


def test_an_existing_step_stays_as_it_is(two_steps: pathlib.Path):
    checkpointer = Checkpointer(two_steps, keep=2)
    checkpointer.save(5, _small(99.0), {"step": "another"})
    restored = checkpointer.restore(_small_target)
    assert restored is not None and restored.record == {"step": 5}
    chex.assert_trees_all_equal(restored.arrays, _small(5))


def test_an_earlier_step_is_refused(two_steps: pathlib.Path):
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        Checkpointer(two_steps, keep=2).save(4, _small(4), {})


def test_a_record_that_is_no_json_is_refused_before_writing(two_steps: pathlib.Path):
    with pytest.raises(TypeError):
        Checkpointer(two_steps, keep=2).save(6, _small(6), {"array": np.zeros(2)})
    assert sorted(path.name for path in two_steps.iterdir()) == ["3", "5"]


def test_an_empty_array_is_refused_before_writing(two_steps: pathlib.Path):
    with pytest.raises(ValueError, match="b is empty"):
        Checkpointer(two_steps, keep=2).save(6, {"a": np.ones(2), "b": np.zeros((3, 0))}, {})
    assert sorted(path.name for path in two_steps.iterdir()) == ["3", "5"]


@contextlib.contextmanager
def _files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses longer ones, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(16)
def test_a_step_that_cannot_be_written_leaves_those_before(two_steps: pathlib.Path):
    checkpointer = Checkpointer(two_steps, keep=2)
    arrays = {"w": np.random.default_rng(0).random(200_000)}
    with _files_of_at_most(300_000), pytest.raises(SaveError, match="checkpoint 7 could not be"):
        checkpointer.save(7, arrays, {})
    assert sorted(path.name for path in two_steps.iterdir()) == ["3", "5"]
    checkpointer.save(7, arrays, {"step": 7})
    restored = checkpointer.restore(lambda _: {"w": np.zeros(200_000)})
    assert restored is not None and restored.record == {"step": 7}
    np.testing.assert_array_equal(restored.arrays["w"], arrays["w"])


# ---------------------------------------------------------------------------- damage


def _data_files(step: pathlib.Path) -> list[pathlib.Path]:
    """Files of a step that hold content, as opposed to orbax's markers and notes."""
    return [x for x in sorted(step.rglob("*")) if x.is_file() and x.parent.name == "d"]


def _flip(path: pathlib.Path) -> None:
    """Flips 64 bytes in the middle."""
    content = bytearray(path.read_bytes())
    middle = max(0, len(content) // 2 - 32)
    for index in range(middle, min(len(content), middle + 64)):
        content[index] ^= 0xFF
    path.write_bytes(content)


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _delete(path: pathlib.Path) -> None:
    path.unlink()


_DAMAGES = [_flip, _truncate, _delete]


@pytest.mark.fault(15)
@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_data_file_falls_back_to_the_step_before(
    two_steps: pathlib.Path, damage: Any, caplog: pytest.LogCaptureFixture
):
    largest = max(_data_files(two_steps / "5"), key=lambda path: path.stat().st_size)
    damage(largest)
    with caplog.at_level(logging.ERROR):
        restored = Checkpointer(two_steps, keep=2).restore(_small_target)
    assert restored is not None and restored.step == 3 and restored.record == {"step": 3}
    chex.assert_trees_all_equal(restored.arrays, _small(3))
    assert "checkpoint 5 is damaged" in caplog.text


@pytest.mark.fault(14)
def test_raw_bytes_that_orbax_accepts_are_caught_by_the_digest(
    two_steps: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A reader that returns other values than were written, without an error."""
    honest = Checkpointer._arrays

    def flipped(self: Checkpointer, step: int, target: Any, **options: Any) -> Any:
        arrays = honest(self, step, target, **options)
        if step == 5:
            arrays["w"][100] = np.nextafter(arrays["w"][100], np.inf)
        return arrays

    monkeypatch.setattr(Checkpointer, "_arrays", flipped)
    restored = Checkpointer(two_steps, keep=2).restore(_small_target)
    assert restored is not None and restored.step == 3
    assert "1 leaves do not match their digest, first ['w']" in caplog.text


@pytest.mark.fault(15)
@pytest.mark.parametrize("damage", [_flip, _delete])
def test_damage_to_any_file_is_harmless_or_noticed(
    two_steps: pathlib.Path, tmp_path: pathlib.Path, damage: Any
):
    """Whatever file is hit: the right arrays and counters of one of the steps, never an error."""
    names = [x.relative_to(two_steps) for x in (two_steps / "5").rglob("*") if x.is_file()]
    assert len(names) > 8
    for index, name in enumerate(names):
        copy = tmp_path / str(index)
        shutil.copytree(two_steps, copy)
        damage(copy / name)
        checkpointer = Checkpointer(copy, keep=2)
        restored = checkpointer.restore(_small_target)
        checkpointer.close()
        assert restored is not None, name
        assert restored.record == {"step": restored.step}, name
        chex.assert_trees_all_equal(restored.arrays, _small(restored.step))


@pytest.mark.fault(14)
def test_a_flipped_counter_is_noticed(two_steps: pathlib.Path):
    path = two_steps / "5" / "record" / "metadata"
    text = path.read_text()
    assert '"step": 5' in text
    path.write_text(text.replace('"step": 5', '"step": 6'))
    restored = Checkpointer(two_steps, keep=2).restore(_small_target)
    assert restored is not None and restored.step == 3


@pytest.mark.fault(14)
def test_all_damaged_is_an_error_that_names_the_steps(two_steps: pathlib.Path):
    for step in ("3", "5"):
        _truncate(max(_data_files(two_steps / step), key=lambda path: path.stat().st_size))
    before = sorted(two_steps.rglob("*"))
    with pytest.raises(CorruptCheckpointError, match=r"steps \[3, 5\]"):
        Checkpointer(two_steps, keep=2).restore(_small_target)
    assert sorted(two_steps.rglob("*")) == before


@pytest.mark.fault(14)
def test_a_run_that_fell_back_writes_the_damaged_step_anew(two_steps: pathlib.Path):
    _truncate(max(_data_files(two_steps / "5"), key=lambda path: path.stat().st_size))
    checkpointer = Checkpointer(two_steps, keep=2)
    restored = checkpointer.restore(_small_target)
    assert restored is not None and restored.step == 3
    assert sorted(path.name for path in two_steps.iterdir()) == ["3", "5"]

    checkpointer.save(4, _small(4), {"step": 4})
    checkpointer.save(5, _small(50), {"step": 50})

    assert checkpointer.steps() == [4, 5]
    again = Checkpointer(two_steps, keep=2).restore(_small_target)
    assert again is not None and again.record == {"step": 50}
    aside = [path for path in two_steps.iterdir() if ".damaged-" in path.name]
    assert len(aside) == 1 and aside[0].name.startswith("5.")


# ---------------------------------------------------------------------- interruption

_KILLED_SAVE = """
    import os, pathlib, signal, sys
    import numpy as np
    from jaxvla.checkpoint import Checkpointer

    directory, event, ending = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def tree(step):
        return {"w": np.arange(2048.0) * step, "n": np.asarray(step)}

    def hook(name, arguments):
        if is_armed and name == event and str(arguments[0]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    is_armed = False
    sys.addaudithook(hook)
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.save(1, tree(1), {"step": 1})
    is_armed = True
    checkpointer.save(2, tree(2), {"step": 2})
    sys.exit("the hook was not reached")
"""


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("event", "ending"),
    [
        ("os.mkdir", "arrays.orbax-checkpoint-tmp"),  # nothing of the step is written
        ("os.rename", "arrays.orbax-checkpoint-tmp"),  # its arrays are, but not committed
        ("os.rename", "2.orbax-checkpoint-tmp"),  # all is, but for the last rename
    ],
)
def test_a_process_killed_while_saving_leaves_the_step_before(
    directory: pathlib.Path, event: str, ending: str, fault_row: FaultRow
):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED_SAVE), str(directory), event, ending],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left_over = [x.name for x in directory.iterdir()]
    assert "2.orbax-checkpoint-tmp" in left_over and "2" not in left_over

    checkpointer = Checkpointer(directory, keep=2)
    assert checkpointer.steps() == [1]
    restored = checkpointer.restore(_small_target)
    assert restored is not None and restored.record == {"step": 1}
    chex.assert_trees_all_equal(restored.arrays, _small(1))

    checkpointer.save(2, _small(2), {"step": 2})
    assert sorted(x.name for x in directory.iterdir()) == ["1", "2"]
    restored = Checkpointer(directory, keep=2).restore(_small_target)
    assert restored is not None and restored.step == 2
    fault_row(survived=True)


@pytest.mark.fault(13)
def test_only_unfinished_steps_are_cleaned(two_steps: pathlib.Path):
    unfinished = two_steps / "6.orbax-checkpoint-tmp"
    foreign = two_steps / "notes"
    for path in (unfinished, foreign):
        path.mkdir()
        (path / "file").write_text("x")
    checkpointer = Checkpointer(two_steps, keep=2)
    assert checkpointer.restore(_small_target) is not None
    assert unfinished.exists()  # reading changes nothing
    checkpointer.save(7, _small(7), {})
    assert sorted(x.name for x in two_steps.iterdir()) == ["5", "7", "notes"]


# -------------------------------------------------------------------------- mismatch


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ({"w": np.zeros(1024), "n": np.asarray(0)}, r"w is float64 \[2048\] in it, float64 \[1024"),
        ({"w": np.zeros(2048, np.float32), "n": np.asarray(0)}, r"float32 \[2048\] now"),
        ({"w": np.zeros(2048)}, r"n is int64 \[\] in it, absent now"),
        ({**_small(0), "extra": {"b": np.zeros(3)}}, r"extra/b is absent in it, float64 \[3\] now"),
        ({"v": np.zeros(2048)}, r"\(and 2 more leaves\)"),
    ],
)
@pytest.mark.parametrize("method", ["restore", "check"])
def test_another_structure_is_refused_and_not_called_damage(
    two_steps: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    target: Any,
    complaint: str,
    method: str,
):
    checkpointer = Checkpointer(two_steps, keep=2)
    with pytest.raises(CheckpointMismatchError, match=complaint) as raised:
        getattr(checkpointer, method)(lambda record: target)
    assert isinstance(raised.value, UsageError)  # the command line exits with 2
    assert "checkpoint 5 of" in str(raised.value) and "Fix: " in str(raised.value)
    assert "damaged" not in caplog.text


def test_an_error_of_the_target_is_not_called_damage(two_steps: pathlib.Path):
    def broken(record: dict[str, Any]) -> Any:
        return record["no such key"]

    with pytest.raises(KeyError, match="no such key"):
        Checkpointer(two_steps, keep=2).restore(broken)


def test_check_accepts_what_restore_accepts_and_reads_no_arrays(two_steps: pathlib.Path):
    for path in _data_files(two_steps / "5"):
        path.unlink()
    Checkpointer(two_steps, keep=2).check(_small_target)
