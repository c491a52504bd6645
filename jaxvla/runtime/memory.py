"""What a device has to hold in each role, from shapes alone. Meshes need no devices for this.

Not counted: what XLA needs while it computes, and the state of simulated worlds.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxvla.algorithms import ALGORITHMS
from jaxvla.layout import RoleLayout
from jaxvla.learning.optimizer import freeze, make_optimizer, trained
from jaxvla.learning.train_state import TrainState, init_state
from jaxvla.runtime.build import Blueprint
from jaxvla.sharding import params_shardings, planned_mesh
from jaxvla.types import Params, TrainingBatch, stand_in


class MemoryEstimate:
    """Bytes per device of the learner and of the policy servers of a run, in any layout."""

    def __init__(self, blueprint: Blueprint):
        self._blueprint = blueprint
        self._config = blueprint.config
        self._optimizer = make_optimizer(self._config.optimizer, self.params)

    @functools.cached_property
    def params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return self._blueprint.params_struct()

    @functools.cached_property
    def _state(self) -> TrainState:
        return jax.eval_shape(lambda p: init_state(p, self._optimizer), self.params)

    def placed_state(self, where: RoleLayout) -> TrainState:
        """Shardings of the learner's state on its devices."""
        rules = self._blueprint.policy.rules()
        return params_shardings(self._state, rules, planned_mesh(where), "learning")

    def learning(self, where: RoleLayout) -> dict[str, int]:
        """Bytes on each device of the learner, by what they are for."""
        config, placed = self._config, self.placed_state(where)
        gradients = [trained(x, config.optimizer.trainable) for x in (self.params, placed.params)]
        found = {
            "parameters": sharded_bytes(self.params, placed.params),
            "gradients": sharded_bytes(*gradients),
            "optimizer state": sharded_bytes(self._state.opt_state, placed.opt_state),
            "activations": self._activations // where.num_devices,
        }
        if config.learning.encode_once:
            found["encodings"] = self._kept_encodings // where.num_devices
        return found

    def serving(self, where: RoleLayout) -> dict[str, int]:
        """Bytes on each device of the policy servers, by what they are for."""
        serving, trainable = self._config.serving, self._config.optimizer.trainable
        part = where.split(serving.num_servers)[0] if serving.split_devices else where
        rules = self._blueprint.policy.rules()
        placed = params_shardings(self.params, rules, planned_mesh(part), "serving")
        swapped = [trained(tree, trainable) for tree in (self.params, placed)]
        return {
            "parameters": sharded_bytes(self.params, placed),
            "new parameters": sharded_bytes(*swapped),
            "encodings": self._served_encodings // part.axes["data"],
        }

    def total(self, role: str, where: RoleLayout) -> int:
        """Bytes on each device of a role, of all policy servers on it."""
        if role == "learning":
            return sum(self.learning(where).values())
        if role != "serving":
            return 0
        serving = self._config.serving
        on_device = 1 if serving.split_devices else serving.num_servers
        return on_device * sum(self.serving(where).values())

    @functools.cached_property
    def _activations(self) -> int:
        rows = minibatch_rows(self._blueprint) // self._config.learning.num_microbatches
        return _activation_bytes(self._blueprint, self.params, rows)

    @functools.cached_property
    def _kept_encodings(self) -> int:
        samples = minibatch_rows(self._blueprint) * self._config.algorithm.num_minibatches
        return self._encoding_bytes(samples)

    @functools.cached_property
    def _served_encodings(self) -> int:
        return self._encoding_bytes(self._config.serving.buckets[-1])

    def _encoding_bytes(self, rows: int) -> int:
        observation = self._blueprint.observation_struct(rows)
        return tree_bytes(jax.eval_shape(self._blueprint.policy.encode, self.params, observation))


def minibatch_rows(blueprint: Blueprint) -> int:
    """Samples in a minibatch."""
    config = blueprint.config
    per_update = (
        config.learning.trajectories_per_update
        * config.simulation.envs_per_group
        * config.simulation.segment_length
    )
    return per_update // config.algorithm.num_minibatches


def tree_bytes(tree: Any) -> int:
    """Of all leaves."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sharded_bytes(tree: Any, placed: Any) -> int:
    """Of all leaves on one device, which holds a shard of each."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    )


def _activation_bytes(blueprint: Blueprint, params: Params, rows: int) -> int:
    """Bytes that the forward pass of one minibatch keeps for its backward pass, its encoding
    included."""
    config, policy = blueprint.config, blueprint.policy
    algorithm = ALGORITHMS.get(config.algorithm.name)(config.algorithm)
    observation, sample = blueprint.observation_struct(rows), blueprint.sample_struct(rows)
    scalar = stand_in(jax.ShapeDtypeStruct((rows,), jnp.float32))
    batch = TrainingBatch(
        observation=observation,
        trace=sample.trace,
        behavior_log_prob=scalar,
        proximal_log_prob=scalar,
        proximal_value=scalar,
        staleness=stand_in(jax.ShapeDtypeStruct((rows,), jnp.int32)),
        advantage=scalar,
        return_=scalar,
        weight=scalar,
    )

    def residuals(params: Any, batch: TrainingBatch) -> Any:
        def loss(params: Any) -> jax.Array:
            params = freeze(params, config.optimizer.trainable)
            encoding = policy.encode(params, batch.observation)
            encoded = dataclasses.replace(batch, observation=encoding)
            return algorithm.loss(policy, params, encoded)[0]

        return jax.vjp(loss, params)[1]

    return tree_bytes(jax.eval_shape(residuals, params, batch))
