"""Goals read from LIBERO, judged in MJX, against LIBERO's own verdicts."""

import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from libero_marks import needs_libero
from libero_stock import run_probe
from mujoco import mjx

from jaxvla.envs import predicates
from jaxvla.envs.libero_goals import find_threshold

TASKS = {
    "libero_spatial:0": "on(bowl, plate)",
    "libero_10:9": "in(mug, microwave), close(microwave)",
}
"""Those that every run looks at."""
MORE_TASKS = {
    "libero_10:2": "turnon(stove), on(moka pot, stove)",
    "libero_10:3": "in(bowl, bottom drawer), close(bottom drawer)",
    "libero_goal:0": "open(middle drawer)",
    "libero_goal:2": "on(wine bottle, top of the cabinet)",
    "libero_goal:5": "on(plate, zone of the table)",
    "libero_object:0": "in(can, basket)",
    "libero_90:35": "open(microwave)",
    "libero_90:39": "turnoff(stove)",
}
"""With them, each comparison and each kind of support that the 130 tasks have."""
PROBE_TIMEOUT_S = 900.0
"""A guard against a hanging probe, which takes about 15 s on an idle machine."""


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (lambda x: x < 0.1, ("<", 0.1)),
        (lambda x: x <= -2.0, ("<=", -2.0)),
        (lambda x: x > 0.0, (">", 0.0)),
        (lambda x: x >= 0.1, (">=", 0.1)),
    ],
)
def test_thresholds_are_found(
    condition: Callable[[float], bool], expected: tuple[str, float]
) -> None:
    assert find_threshold(condition, [0.1, -2.0, 0.0, 0.1]) == expected


@pytest.mark.parametrize("condition", [lambda x: True, lambda x: x > 0.5, lambda x: 0.0 < x < 0.1])
def test_unclear_thresholds_are_refused(condition: Callable[[float], bool]) -> None:
    with pytest.raises(ValueError, match="changes at"):
        find_threshold(condition, [0.0, 0.1])


@needs_libero
@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [*TASKS, *(pytest.param(task, marks=pytest.mark.slow) for task in MORE_TASKS)]
)
def test_verdicts_are_those_of_libero(tmp_path: pathlib.Path, task: str) -> None:
    """In 240 states."""
    run_probe("libero_goal_probe.py", str(tmp_path), task, timeout_s=PROBE_TIMEOUT_S)
    with np.load(tmp_path / f"{task.replace(':', '_')}.npz") as archive:
        seen = dict(archive)
    terms, reached = judge(seen)
    assert len(seen["success"]) >= 200
    np.testing.assert_array_equal(terms, seen["verdicts"])
    np.testing.assert_array_equal(reached, seen["success"])
    share = seen["verdicts"].mean(0)
    assert share.min() > 0.02 and share.max() < 0.98  # both answers occur


def judge(seen: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts [N, num_terms] and [N] of the goal on the reduced scene in MJX."""
    model = mujoco.MjModel.from_xml_string(str(seen["xml"]))
    model.body_pos[:], model.body_quat[:] = seen["body_pos"], seen["body_quat"]
    mjx_model = mjx.put_model(model, impl="jax")
    terms = [predicates.term_from_dict(term) for term in json.loads(str(seen["goal"]))]
    goal = predicates.bind(terms, model)

    def verdict(qpos: jax.Array) -> tuple[jax.Array, jax.Array]:
        data = mjx.kinematics(mjx_model, mjx.make_data(mjx_model).replace(qpos=qpos))
        return goal.terms(data), goal.is_reached(data)

    results = jax.jit(jax.vmap(verdict))(jnp.asarray(seen["qpos"], jnp.float32))
    return np.asarray(results[0]), np.asarray(results[1])
