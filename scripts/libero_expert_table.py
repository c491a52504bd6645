"""How often the scripted expert solves LIBERO's tasks in the libero package itself.

    MUJOCO_GL=disable python scripts/libero_expert_table.py
    MUJOCO_GL=disable python scripts/libero_expert_table.py --suites=libero_90 --task_ids=0,1

Needs the libero extra; renders nothing. Takes about 5 s an episode. Episodes start as those of
libero_host: init state k, fixtures placed with seed k, 10 control steps at rest. They end with
success or with the suite's time limit. The table has one line per task:

  solved   episodes with success / episodes
  steps    mean number of control steps of the solved ones / time limit
  failed   the init states of the others

A task whose goal is beyond the expert's rules gets a line that says so. With --least, the program
fails if fewer episodes of any task are solved.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disable")  # read when LIBERO is imported

import jax
import numpy as np
from absl import app, flags

from jaxvla.envs import libero_compiler as compiler
from jaxvla.envs.libero_expert import bind_plan
from jaxvla.envs.libero_goals import extract_goal
from jaxvla.envs.libero_host import LiberoHost, LiberoHostConfig
from jaxvla.envs.libero_init_states import load_init_states
from jaxvla.envs.libero_plans import make_plan
from jaxvla.envs.libero_start import settle
from jaxvla.envs.libero_workspace import read_state

_SUITES = flags.DEFINE_list(
    "suites", ["libero_spatial", "libero_object", "libero_goal", "libero_10"], "Benchmark suites."
)
_TASK_IDS = flags.DEFINE_list("task_ids", [], "Positions in each suite; empty: all.")
_STATES = flags.DEFINE_integer("states", 10, "Init states per task.", lower_bound=1)
_LEAST = flags.DEFINE_integer("least", 0, "Solved episodes that every task needs.")

_COLUMNS = "{:<16}{:>3}  {:>7}  {:>9}  {:<20}{}"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    print(_COLUMNS.format("suite", "id", "solved", "steps", "failed", "name"))
    worst = _STATES.value
    for suite in _SUITES.value:
        ids = [int(task_id) for task_id in _TASK_IDS.value]
        for task_id in ids or range(len(LiberoHost(LiberoHostConfig(suite=suite)).spec.tasks)):
            lengths, line = _measure(suite, task_id)
            worst = min(worst, sum(length is not None for length in lengths))
            print(line, flush=True)
    if worst < _LEAST.value:
        sys.exit(f"a task was solved {worst} times, less than {_LEAST.value}")


def _measure(suite: str, task_id: int) -> tuple[list[int | None], str]:
    """Steps of each episode (None: not solved), and the table's line."""
    entry, limit = compiler.task_entry(suite, task_id)
    name = entry["name"]
    states = load_init_states(entry["init_states_file"])[: _STATES.value, 1:]
    with compiler.open_env(entry["bddl_file"]) as env:
        model, fixtures = compiler.model_of(env), compiler.fixture_bodies(env)
        try:
            expert = bind_plan(make_plan(extract_goal(env), fixtures, model), model)
        except ValueError as error:
            return [], _COLUMNS.format(suite, task_id, "-", "-", "no plan", f"{name}: {error}")
        act = jax.jit(expert.action)
        lengths = []
        for seed, state in enumerate(states):
            compiler.place_fixtures(env, fixtures, seed)
            settle(env, state)
            lengths.append(_run(env, act, limit))
    failed = ",".join(str(k) for k, length in enumerate(lengths) if length is None)
    solved = [length for length in lengths if length is not None]
    steps = f"{np.mean(solved):.0f}/{limit}" if solved else "-"
    score = f"{len(solved)}/{len(lengths)}"
    return lengths, _COLUMNS.format(suite, task_id, score, steps, failed or "-", name)


def _run(env: Any, act: Callable[[Any], jax.Array], limit: int) -> int | None:
    """Control steps until success, or None."""
    for step in range(limit):
        action = np.asarray(act(read_state(env.env.sim.data._data)), np.float64)
        if env.step(action)[2]:
            return step + 1
    return None


if __name__ == "__main__":
    app.run(main)
