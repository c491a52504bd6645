"""Checkpoints: reading a part of one, and the identity that it must share with the run."""

import logging
import pathlib
import shutil
from typing import Any

import chex
import flax.struct
import numpy as np
import optax
import pytest

from jaxvla.checkpoint import Checkpointer, CheckpointMismatchError

# A read that fails makes orbax close its event loop while other reads are still under way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PARAMS = "state/params/"


@flax.struct.dataclass(kw_only=True)
class _State:
    params: Any
    moments: Any


def _params(factor: float) -> dict[str, Any]:
    return {"head": {"w": np.arange(2048.0) * factor}, "b": np.full(3, factor, np.float32)}


def _target(record: dict[str, Any]) -> Any:
    """The parameters alone."""
    return {"state": {"params": _params(0.0)}}


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where checkpoints go, with steps 3 and 5: parameters, an optimizer and an env group."""
    path = tmp_path / "checkpoints"
    checkpointer = Checkpointer(path, keep=2, identity={"tokenizer": "a"})
    for step in (3, 5):
        moments = optax.masked(optax.adam(1.0), {"head": True, "b": False}).init(_params(step))
        state = _State(params=_params(step), moments=(moments, None))
        groups = {"group_0": {"qpos": np.arange(5.0), "missing": None}}
        checkpointer.save(step, {"state": state, "groups": groups}, {"step": step})
    checkpointer.close()
    return path


def _data_files(step: pathlib.Path) -> list[pathlib.Path]:
    """Files of a step that hold content or say where it lies."""
    return [x for x in sorted((step / "arrays").rglob("*")) if x.is_file()]


def test_a_part_is_restored_whatever_the_rest_is_like(directory: pathlib.Path):
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.check(_target, within=PARAMS)
    restored = checkpointer.restore(_target, within=PARAMS)
    assert restored is not None and restored.step == 5 and restored.record == {"step": 5}
    chex.assert_trees_all_equal(restored.arrays, {"state": {"params": _params(5)}})
    with pytest.raises(CheckpointMismatchError, match="absent now"):  # but only when asked to
        checkpointer.restore(_target)


@pytest.mark.parametrize("method", ["restore", "check"])
@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"head": {"w": np.zeros(2048)}}, r"state/params/b is float32 \[3\] in it, absent now"),
        (_params(0) | {"c": np.zeros(1)}, r"state/params/c is absent in it, float64 \[1\] now"),
        (
            _params(0) | {"b": np.zeros(4, np.float32)},
            r"params/b is float32 \[3\] in it, .*\[4\] now",
        ),
    ],
    ids=["less", "more", "other"],
)
def test_a_part_must_match_exactly(
    directory: pathlib.Path, params: Any, complaint: str, method: str
):
    checkpointer = Checkpointer(directory, keep=2)
    with pytest.raises(CheckpointMismatchError, match=complaint):
        getattr(checkpointer, method)(lambda _: {"state": {"params": params}}, within=PARAMS)


def test_what_is_read_is_compared_with_its_digests(
    directory: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A reader that returns other values than were written, without an error."""
    honest = Checkpointer._arrays

    def flipped(self: Checkpointer, step: int, target: Any, **options: Any) -> Any:
        arrays = honest(self, step, target, **options)
        if step == 5:
            arrays["state"]["params"]["head"]["w"][100] += 1e-9
        return arrays

    monkeypatch.setattr(Checkpointer, "_arrays", flipped)
    with caplog.at_level(logging.ERROR):
        restored = Checkpointer(directory, keep=2).restore(_target, within=PARAMS)
    assert restored is not None and restored.step == 3
    assert "1 leaves do not match their digest, first ['state/params/head/w']" in caplog.text


def _flip(path: pathlib.Path) -> None:
    """Flips 64 bytes in the middle."""
    content = bytearray(path.read_bytes())
    middle = max(0, len(content) // 2 - 32)
    for index in range(middle, min(len(content), middle + 64)):
        content[index] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip, pathlib.Path.unlink], ids=["flip", "delete"])
def test_damage_to_any_file_is_harmless_or_noticed(
    directory: pathlib.Path, tmp_path: pathlib.Path, damage: Any
):
    """Whatever file is hit: the right parameters of one of the steps, never an error."""
    files = _data_files(directory / "5")
    assert len(files) > 5
    for index, path in enumerate(files):
        copy = tmp_path / str(index)
        shutil.copytree(directory, copy)
        damage(copy / path.relative_to(directory))
        checkpointer = Checkpointer(copy, keep=2)
        restored = checkpointer.restore(_target, within=PARAMS)
        checkpointer.close()
        assert restored is not None, path
        chex.assert_trees_all_equal(restored.arrays["state"]["params"], _params(restored.step))


@pytest.mark.parametrize("method", ["restore", "check"])
def test_another_identity_is_refused_and_named(directory: pathlib.Path, method: str):
    same, other = (
        Checkpointer(directory, keep=2, identity={"tokenizer": name}) for name in ("a", "b")
    )
    getattr(same, method)(_target, within=PARAMS)
    with pytest.raises(CheckpointMismatchError, match="another tokenizer: 'a' in it, 'b' now"):
        getattr(other, method)(_target, within=PARAMS)


def test_a_step_that_records_no_identity_is_of_any(tmp_path: pathlib.Path):
    """Such were written before identities were."""
    Checkpointer(tmp_path, keep=2).save(1, {"w": np.ones(2)}, {})
    checkpointer = Checkpointer(tmp_path, keep=2, identity={"tokenizer": "b"})
    restored = checkpointer.restore(lambda _: {"w": np.zeros(2)})
    assert restored is not None and restored.step == 1
