"""Writes LIBERO's verdicts on states about the goals of its tasks; see test_libero_goals.py.

    python libero_goal_probe.py OUTPUT_DIRECTORY SUITE:TASK ...

Writes SUITE_TASK.npz for each. MUJOCO_GL=disable must be set: nothing is rendered.

States are made about the goal: each of its terms is brought near to its limits by itself and
together with the others, by placing the object at random about its target, by letting it fall
from there, and by moving it to within 20 micrometres of the first contact; joints stand close to
their thresholds. Others come from episodes with random actions.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from libero_stock import open_env, reduced_scene

from jaxvla.envs.libero_goals import extract_goal
from jaxvla.envs.predicates import (
    GoalTerm,
    InRegion,
    JointsAt,
    OnObject,
    OnRegion,
    Region,
    term_to_dict,
)

NUM_STATES = 60
"""Of each of the four kinds."""
NUM_FALLING_STEPS = 150
FINE_M = 2e-5
"""Distance from the first contact; float32 resolves 1e-7 m here."""


def main(directory: str, tasks: list[str]) -> None:
    for name in tasks:
        suite, task_id = name.rsplit(":", 1)
        with open_env(suite, int(task_id)) as (env, init_states):
            probe = Probe(env, init_states, np.random.default_rng(0))
            seen = {**reduced_scene(env), **probe.run()}
            seen["goal"] = json.dumps([term_to_dict(term) for term in probe.terms])
        np.savez(pathlib.Path(directory) / f"{suite}_{task_id}.npz", **seen)


class Probe:
    """Makes states of one task and asks LIBERO about them."""

    def __init__(self, env: Any, init_states: np.ndarray, rng: np.random.Generator):
        self.env, self.init_states, self.rng = env, init_states, rng
        self.sim = env.env.sim
        self.terms = extract_goal(env)
        self.qpos: list[np.ndarray] = []
        self.verdicts: list[list[bool]] = []
        self.success: list[bool] = []

    def run(self) -> dict[str, Any]:
        """Returns qpos [N, nq], verdicts [N, num_terms] and success [N]."""
        for make in (self._placed, self._fallen, self._touching):
            for _ in range(NUM_STATES):
                self._load()
                make()
                self._record()
        self._episodes()
        return {"qpos": self.qpos, "verdicts": self.verdicts, "success": self.success}

    def _load(self) -> None:
        self.env.set_state(self.init_states[self.rng.integers(len(self.init_states))])
        self.sim.forward()

    def _record(self) -> None:
        self.sim.forward()
        self.qpos.append(self.sim.data.qpos.copy())
        goal = self.env.env.parsed_problem["goal_state"]
        self.verdicts.append([bool(self.env.env._eval_predicate(state)) for state in goal])
        self.success.append(bool(self.env.check_success()))

    def _placed(self) -> None:
        """Objects at random about their targets, in the order of the terms."""
        self._set_joints()
        for term in self.terms:
            if not isinstance(term, JointsAt):
                self._put(term, self.rng.uniform(-1.3, 1.3, 3))

    def _fallen(self) -> None:
        """Objects that were dropped a little above their targets."""
        self._set_joints()
        for term in self.terms:
            if not isinstance(term, JointsAt):
                self._put(term, np.append(self.rng.uniform(-1.0, 1.0, 2), 0.7))
        for _ in range(NUM_FALLING_STEPS):
            self.sim.step()

    def _touching(self) -> None:
        """As `_placed`; objects that have to touch something do so, or just not."""
        self._set_joints()
        for term in self.terms:
            if isinstance(term, JointsAt):
                continue
            self._put(term, np.append(self.rng.uniform(-1.1, 1.1, 2), self.rng.uniform(-0.2, 1)))
            if isinstance(term, OnObject | OnRegion) and term.contact is not None:
                self._approach(term.object, term.contact.geoms, term.contact.other_geoms)

    def _approach(self, body: str, geoms: tuple[str, ...], others: tuple[str, ...]) -> None:
        """Moves the object up out of contact, then down to the first contact."""
        address = self._address(body) + 2
        start = self.sim.data.qpos[address]
        apart, near = start + 0.3, start - 0.1
        for _ in range(24):
            self.sim.data.qpos[address] = middle = (apart + near) / 2
            self.sim.forward()
            touches = self.env.env.check_contact(list(geoms), list(others))
            apart, near = (apart, middle) if touches else (middle, near)
        self.sim.data.qpos[address] = apart + self.rng.choice([-10, -1, 1, 10]) * FINE_M

    def _put(self, term: GoalTerm, place: np.ndarray) -> None:
        """Puts the object at a place in [-1, 1]^3 of where the term may hold."""
        assert not isinstance(term, JointsAt)
        self.sim.forward()
        low, high = self._target(term)
        position = (low + high) / 2 + (high - low) / 2 * place
        address = self._address(term.object)
        self.sim.data.qpos[address : address + 3] = position

    def _target(self, term: Any) -> tuple[np.ndarray, np.ndarray]:
        """Corners of a box in the world in which the object's position is to be."""
        data, model = self.sim.data, self.sim.model
        if isinstance(term, OnObject):
            centre = data.body_xpos[model.body_name2id(term.support)]
            return centre - np.array([0.03, 0.03, 0.02]), centre + np.array([0.03, 0.03, 0.1])
        region: Region = term.region
        body = model.body_name2id(region.body)
        rotation = data.body_xmat[body].reshape(3, 3)
        centre = data.body_xpos[body] + rotation @ region.pos
        # All regions of the package are turned by quarters, up to a little.
        half = np.abs(rotation @ region.half_size)
        if isinstance(term, InRegion):
            return centre - half - np.array([0, 0, 0.01]), centre + half
        top = centre + np.array([0, 0, 1]) * half
        sides = np.array([1, 1, 0]) * half
        return top - sides - np.array([0, 0, 0.005]), top + sides + np.array([0, 0, 0.1])

    def _address(self, body: str) -> int:
        """Where in qpos the pose of a free body starts."""
        joint = self.sim.model.body_jntadr[self.sim.model.body_name2id(body)]
        return int(self.sim.model.jnt_qposadr[joint])

    def _set_joints(self) -> None:
        """Joints of the goal at distances of 1e-5 to 0.3 from their thresholds."""
        for term in self.terms:
            if isinstance(term, JointsAt):
                for joint in term.joints:
                    distance = 10.0 ** self.rng.uniform(-5, -0.5) * self.rng.choice([-1, 1])
                    address = self.sim.model.get_joint_qpos_addr(joint)
                    self.sim.data.qpos[address] = term.threshold + distance

    def _episodes(self) -> None:
        """States from episodes with random actions."""
        for _ in range(3):
            self._load()
            for _ in range(NUM_STATES // 3):
                self.env.step(self.rng.uniform(-1, 1, 7))
                self._record()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
